// Formulas are rendered in the reader's browser by KaTeX, which is part of the site: no network is needed.
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
