// Names what a screen reader would find nameless, and follows the answer while the end of the page is in sight.
() => {
  const name = (place, words) => document.querySelectorAll(place).forEach((one) => one.setAttribute("aria-label", words));
  const label = () => {
    name("#question textarea", "Your question");
    name("#question .upload-button", "Add pictures");
    name("#question .submit-button", "Ask");
    document.querySelectorAll("#question textarea").forEach((one) => one.setAttribute("maxlength", "8000"));
  };
  const follow = () => {
    label();
    const page = document.scrollingElement;
    if (page.scrollHeight - page.scrollTop - page.clientHeight < 400) page.scrollTop = page.scrollHeight;
  };
  label();
  new MutationObserver(follow).observe(document.querySelector("#conversation"), { childList: true, subtree: true });
  new MutationObserver(label).observe(document.querySelector("#question"), { childList: true, subtree: true });
}
