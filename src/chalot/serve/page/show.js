// Turns as elements. A model's text is Markdown from a stranger: no images, no forms, no styles, no scripts.

const { marked, DOMPurify, hljs } = globalThis;
const ALLOWED = {
  FORBID_TAGS: ["img", "style", "form", "input", "button", "textarea", "select", "video", "audio", "picture", "svg", "math"],
  FORBID_ATTR: ["style", "id", "name", "class"],
  ALLOW_DATA_ATTR: false,
};

export function element(tag, properties = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name.startsWith("aria-") || name === "role") made.setAttribute(name, value);
    else made[name] = value;
  }
  made.append(...children);
  return made;
}

export function button(text, onclick, label) {
  const made = element("button", { type: "button", textContent: text, onclick });
  if (label) made.setAttribute("aria-label", label);
  return made;
}

// Markdown as safe elements, code with colours and a button that copies it.
export function markdown(text) {
  const languages = [];
  const renderer = {
    code: ({ text: code, lang }) => (languages.push(lang), `<pre><code>${escape(code)}</code></pre>\n`),
    html: ({ text: tags }) => escape(tags), // shown as it was written
  };
  const made = new marked.Marked({ gfm: true, breaks: false, renderer }).parse(text);
  const whole = DOMPurify.sanitize(made, { ...ALLOWED, RETURN_DOM_FRAGMENT: true });
  for (const link of whole.querySelectorAll("a")) {
    link.target = "_blank";
    link.rel = "noopener noreferrer nofollow";
  }
  for (const block of whole.children) block.dir = "auto";
  let i = 0;
  for (const pre of whole.querySelectorAll("pre")) colour(pre, languages[i++]);
  return whole;
}

const escape = (text) => text.replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");

function colour(pre, said) {
  const code = pre.firstElementChild ?? pre;
  const language = (said ?? "").trim().split(/\s/)[0].toLowerCase();
  const text = code.textContent;
  if (hljs.getLanguage(language) && text.length < 50000) {
    code.innerHTML = DOMPurify.sanitize(hljs.highlight(text, { language }).value, { ALLOWED_TAGS: ["span"], ALLOWED_ATTR: ["class"] });
  }
  const box = element("div", { className: "code" });
  pre.replaceWith(box);
  const copy = button("Copy", async () => {
    await navigator.clipboard.writeText(text);
    copy.textContent = "Copied";
    setTimeout(() => (copy.textContent = "Copy"), 1500);
  }, "Copy this code");
  copy.className = "copy";
  box.append(copy, pre);
  pre.tabIndex = 0; // it may have to be scrolled by keys
}

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let i = 0;
  for (; n >= 1000 && i < units.length - 1; i++) n /= 1000;
  return `${n < 10 && i ? n.toFixed(2) : n < 100 && i ? n.toFixed(1) : Math.round(n)} ${units[i]}`;
}
