// The page's own few lines: light and dark, links, the address bar.
window.burnish = {
  address(query) {
    return `${location.origin}${location.pathname}${query ? `?${query}` : ""}`;
  },
  show(query) {
    if (query) history.replaceState(null, "", burnish.address(query));
  },
  async copy(query) {
    if (!query) return;
    const address = burnish.address(query);
    burnish.show(query);
    let copied = true;
    try {
      await navigator.clipboard.writeText(address);
    } catch {
      // Not over plain HTTP from another machine; the old way still is.
      const field = document.createElement("textarea");
      field.value = address;
      document.body.append(field);
      field.select();
      copied = document.execCommand("copy");
      field.remove();
    }
    const button = document.querySelector("#bn-link");
    button.textContent = copied ? "Copied" : "In the address bar";
    setTimeout(() => (button.textContent = "Copy link"), 1500);
  },
  theme(dark) {
    document.body.classList.toggle("dark", dark);
    document.documentElement.style.colorScheme = dark ? "dark" : "light";
  },
};
document.addEventListener("DOMContentLoaded", () => {
  document.title = "burnish compare";
  const chosen = localStorage.getItem("burnish-theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const settle = () => burnish.theme(chosen ? chosen === "dark" : system.matches);
  settle();
  // Gradio sets its own class when it mounts.
  new MutationObserver((_, watch) => {
    if (document.querySelector("#bn-go")) {
      watch.disconnect();
      settle();
    }
  }).observe(document.body, {childList: true, subtree: true});
  document.addEventListener("click", event => {
    if (!event.target.closest("[data-theme-switch]")) return;
    const dark = !document.body.classList.contains("dark");
    localStorage.setItem("burnish-theme", dark ? "dark" : "light");
    burnish.theme(dark);
  });
});
