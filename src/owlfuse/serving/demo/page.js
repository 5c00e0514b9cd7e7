// Names what a screen reader would find nameless, and brings a new question to the top, with room for its answers below.
() => {
  const name = (place, words) => document.querySelectorAll(place).forEach((one) => one.setAttribute("aria-label", words));
  const label = () => {
    name("#question textarea", "Your question");
    name("#question .upload-button", "Add pictures");
    name("#question .submit-button", "Ask");
  };
  let asked = 0;
  const follow = () => {
    const questions = document.querySelectorAll("#conversation .asked");
    if (questions.length > asked) questions[questions.length - 1].scrollIntoView({ block: "start" });
    asked = questions.length;
  };
  label();
  new MutationObserver(follow).observe(document.querySelector("#conversation"), { childList: true, subtree: true });
  new MutationObserver(label).observe(document.querySelector("#question"), { childList: true, subtree: true });
}
