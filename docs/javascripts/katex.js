// Formulas are rendered in the reader's browser; without a network they stay readable as LaTeX.
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
