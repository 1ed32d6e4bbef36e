// On a narrow screen the plots keep a readable size and scroll in a box of their own, also with the keyboard. Without
// this script they shrink to the page.
document.addEventListener("DOMContentLoaded", () => {
  const boxes = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (target.scrollWidth > target.clientWidth) target.tabIndex = 0;
      else target.removeAttribute("tabindex");
    }
  });
  for (const image of document.querySelectorAll(".cell_output > img")) {
    const box = document.createElement("div");
    box.className = "wide";
    image.replaceWith(box);
    box.append(image);
    boxes.observe(box);
  }
});
