// Runs once with `element`, the picture's panel, and `trigger`, which sends an event to Python.

// A phrase in the conversation and its places on the picture have the same data-mark.
const lit = (key, on) => document.querySelectorAll('[data-mark]').forEach(
  other => other.classList.toggle('lit', on && other.dataset.mark === key));
const turn = number => document.querySelectorAll('#picture [data-turn]').forEach(
  other => other.classList.toggle('shown', other.dataset.turn === number));
let pinned = null;
const light = key => {
  lit(key, key !== null);
  const frame = element.querySelector('.frame');
  if (frame) frame.classList.toggle('dim', key !== null);
  const mark = key !== null && document.querySelector(`#talk [data-mark="${key}"]`);
  if (mark) turn(mark.closest('[data-turn]').dataset.turn);
};
const over = event => event.target.closest && event.target.closest('[data-mark]');
document.addEventListener('mouseover', event => { const mark = over(event); light(mark ? mark.dataset.mark : pinned); });
document.addEventListener('focusin', event => { const mark = over(event); if (mark) light(mark.dataset.mark); });
document.addEventListener('focusout', event => { if (over(event)) light(pinned); });
document.addEventListener('click', event => {
  const mark = over(event);
  if (!mark && !event.target.closest('#talk, #picture')) return;
  pinned = mark && mark.dataset.mark !== pinned ? mark.dataset.mark : null;
  light(pinned);
});

// An image that is dropped or pasted takes the way of one that is chosen.
const give = files => {
  const input = document.querySelector('input[type=file]');
  if (!input || !files.length) return;
  const one = new DataTransfer();
  one.items.add(files[0]);
  input.files = one.files;
  input.dispatchEvent(new Event('change', {bubbles: true}));
};
element.addEventListener('dragover', event => event.preventDefault());
element.addEventListener('drop', event => { event.preventDefault(); give(event.dataTransfer.files); });
document.addEventListener('paste', event => give(event.clipboardData.files));

// A drag's corners go to Python in pixels of the image; there they become text.
let start = null, band = null;
const place = event => {
  const frame = element.querySelector('.frame'), edges = frame.getBoundingClientRect();
  const part = (value, from, length) => Math.min(Math.max((value - from) / length, 0), 1);
  return [part(event.clientX, edges.left, edges.width), part(event.clientY, edges.top, edges.height)];
};
const corners = event => {
  const [x, y] = place(event);
  return [Math.min(x, start[0]), Math.min(y, start[1]), Math.max(x, start[0]), Math.max(y, start[1])];
};
element.addEventListener('click', event => {
  if (event.target.closest('.drop')) document.querySelector('#upload').click();
});
element.addEventListener('pointerdown', event => {
  if (!event.target.closest('.frame') || event.button) return;
  element.querySelectorAll('.band').forEach(old => old.remove());
  start = place(event);
  band = document.createElement('div');
  band.className = 'band';
  element.querySelector('.frame').append(band);
});
document.addEventListener('pointermove', event => {
  if (!start) return;
  const [x1, y1, x2, y2] = corners(event);
  Object.assign(band.style, {left: 100 * x1 + '%', top: 100 * y1 + '%', width: 100 * (x2 - x1) + '%',
    height: 100 * (y2 - y1) + '%'});
});
document.addEventListener('pointerup', event => {
  if (!start) return;
  const [x1, y1, x2, y2] = corners(event), frame = element.querySelector('.frame');
  start = null;
  if (!frame || x2 - x1 < 0.02 || y2 - y1 < 0.02) { band.remove(); return; }
  const [width, height] = [Number(frame.dataset.width), Number(frame.dataset.height)];
  trigger('select', {box: [x1 * width, y1 * height, x2 * width, y2 * height]});
});
