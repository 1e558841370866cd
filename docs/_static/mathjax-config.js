// Formulas stand only in elements that Sphinx marks, between \( \) and \[ \]. Everything is loaded from the site itself. The bundled
// MathJax would bring a menu and a speech engine that load more; these are its parts without them, with MathML for screen readers.
window.MathJax = {
  loader: { load: ["core", "input/tex", "output/svg", "a11y/assistive-mml"] },
  output: { fontPath: "[mathjax]/../%%FONT%%-font" },
  // On a phone a formula in a line of text may break, one on a line of its own scrolls.
  svg: { displayOverflow: "scroll", linebreaks: { inline: true } },
  options: { ignoreHtmlClass: "bd-main", processHtmlClass: "math" },
  startup: {
    ready() {
      delete MathJax.config.options.menuOptions; // set by the part for screen readers, unknown without the menu
      MathJax.startup.defaultReady();
    },
  },
};
