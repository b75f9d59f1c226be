for (const frame of document.querySelectorAll(".compare")) {
  const slider = frame.querySelector("input");
  const move = () => {
    frame.style.setProperty("--cut", slider.value + "%");
    slider.setAttribute("aria-valuetext", slider.value + " % original, the rest reconstruction");
  };
  slider.addEventListener("input", move);
  move();
}
document.documentElement.classList.add("scripted");
addEventListener("beforeprint", () => {
  for (const part of document.querySelectorAll("#settings ~ details")) part.open = true;
});
