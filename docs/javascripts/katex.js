// Formulas are rendered in the reader's browser by the copy of KaTeX in this site; without scripts they stay readable.
document$.subscribe(({ body }) => {
  if (typeof renderMathInElement === "function") {
    renderMathInElement(body, {
      delimiters: [
        { left: "\\[", right: "\\]", display: true },
        { left: "\\(", right: "\\)", display: false },
      ],
    });
  }
});
