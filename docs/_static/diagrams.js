// Draws the diagrams of a page, in the colours of the page: again when the reader switches between light and dark.
(() => {
  const root = document.documentElement;
  const blocks = [...document.querySelectorAll("pre.mermaid")].map((element) => ({ element, source: element.textContent }));

  const draw = async () => {
    const dark = root.dataset.theme === "dark";
    const style = getComputedStyle(root);
    const colour = (name) => style.getPropertyValue(name).trim();
    mermaid.initialize({
      startOnLoad: false,
      securityLevel: "strict",
      theme: "base",
      fontFamily: "inherit",
      flowchart: { useMaxWidth: true },
      themeVariables: {
        darkMode: dark,
        background: colour("--book-page"),
        primaryColor: colour("--book-node"),
        primaryTextColor: colour("--book-ink"),
        primaryBorderColor: colour("--book-accent"),
        lineColor: colour("--book-ink-soft"),
        textColor: colour("--book-ink"),
        edgeLabelBackground: colour("--book-page"),
        clusterBkg: colour("--book-code"),
        clusterBorder: colour("--book-rule"),
        fontSize: "16px",
      },
    });
    for (const { element, source } of blocks) {
      element.textContent = source;
      element.removeAttribute("data-processed");
    }
    await mermaid.run({ nodes: blocks.map((block) => block.element) });
    root.dataset.diagrams = root.dataset.theme;
  };

  // One drawing at a time: mermaid measures text in the page.
  let queue = Promise.resolve();
  const redraw = () => { queue = queue.then(draw).catch((error) => console.error(error)); };
  new MutationObserver(redraw).observe(root, { attributes: true, attributeFilter: ["data-theme"] });
  document.fonts.ready.then(redraw);
})();
