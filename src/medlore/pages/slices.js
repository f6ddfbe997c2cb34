"use strict";
// Three planes through a volume in plain 2D canvases: no WebGL, no library, no request.

const PLANES = {
  axial: { axis: 2, across: 0, up: 1, ends: ["L", "R", "P", "A"] },
  coronal: { axis: 1, across: 0, up: 2, ends: ["L", "R", "I", "S"] },
  sagittal: { axis: 0, across: 1, up: 2, ends: ["P", "A", "I", "S"] },
};

async function unpacked(text) {
  if (typeof DecompressionStream === "undefined") {
    throw new Error("this browser is too old to unpack the volume; the tables and pictures of this page are whole");
  }
  const signs = atob(text);
  const bytes = new Uint8Array(signs.length);
  for (let i = 0; i < signs.length; i++) bytes[i] = signs.charCodeAt(i);
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).arrayBuffer();
}

class Viewer {
  constructor(root, volume, image, codes) {
    Object.assign(this, { root, volume, image, codes });
    this.shape = volume.shape;
    this.visible = volume.labels.map(() => true);
    this.settings = { opacity: 0.45, zoom: 1, outline: false, cross: true, mirror: false, low: volume.window[0], high: volume.window[1] };
    this.at = this.firstPoint();
    this.centre = [...this.at];
    this.planes = [...root.querySelectorAll("figure[data-plane]")].map((figure) => this.addPlane(figure));
    this.addLabels();
    this.addControls();
    new ResizeObserver(() => this.draw()).observe(root);
    matchMedia(`(resolution: ${devicePixelRatio}dppx)`).addEventListener("change", () => this.draw());
    this.refresh();
  }

  firstPoint() {
    const centres = this.volume.labels.map((label) => label.centre).filter(Boolean);
    if (!centres.length) return this.shape.map((n) => n >> 1);
    return this.shape.map((_, a) => Math.round(centres.reduce((sum, c) => sum + c[a], 0) / centres.length));
  }

  // -- what is shown ------------------------------------------------------------------------------------------------

  refresh() {
    const { low, high } = this.settings;
    this.grey = Uint8ClampedArray.from(this.volume.levels, (value) => (255 * (value - low)) / Math.max(high - low, 1e-9));
    this.top = Int32Array.from(this.volume.sets, (set) => {  // code -> its smallest visible label + 1, or 0
      const seen = set.find((label) => this.visible[label]);
      return seen === undefined ? 0 : seen + 1;
    });
    this.draw();
  }

  draw() {
    for (const plane of this.planes) this.drawPlane(plane);
    this.describe();
  }

  index(i, j, k) {
    return i + this.shape[0] * (j + this.shape[1] * k);
  }

  describe() {
    const [i, j, k] = this.at;
    const mm = this.volume.affine.slice(0, 3).map((row) => row[0] * i + row[1] * j + row[2] * k + row[3]);
    const here = this.index(i, j, k);
    const value = Number(this.volume.levels[this.image[here]].toPrecision(4));
    const names = this.volume.sets[this.codes[here]].map((label) => this.volume.labels[label].name);
    const point = ["x", "y", "z"].map((letter, a) => `${letter} ${(mm[a] + 0).toFixed(1).replace("-", "−")}`).join("  ");
    this.root.querySelector(".readout").textContent =
      `${point} mm   ·   value ${value}${this.volume.unit && " " + this.volume.unit}   ·   ${names.join(", ") || "no label"}`;
  }

  // -- planes -------------------------------------------------------------------------------------------------------

  addPlane(figure) {
    const plane = { ...PLANES[figure.dataset.plane], figure, canvas: figure.querySelector("canvas"), pixels: document.createElement("canvas") };
    plane.slider = figure.querySelector("input");
    plane.slider.max = this.shape[plane.axis] - 1;
    plane.slider.addEventListener("input", () => this.moveTo(plane.axis, Number(plane.slider.value)));
    plane.pixels.width = this.shape[plane.across];
    plane.pixels.height = this.shape[plane.up];
    plane.data = new ImageData(plane.pixels.width, plane.pixels.height);
    this.listen(plane);
    return plane;
  }

  listen(plane) {
    const { canvas } = plane;
    const point = (event) => {
      const box = canvas.getBoundingClientRect();
      const [across, up] = this.voxelAt(plane, (event.clientX - box.left) / box.width, (event.clientY - box.top) / box.height);
      this.at[plane.across] = this.inside(plane.across, across);
      this.at[plane.up] = this.inside(plane.up, up);
      this.draw();
    };
    canvas.addEventListener("pointerdown", (event) => {
      canvas.setPointerCapture(event.pointerId);
      point(event);
    });
    canvas.addEventListener("pointermove", (event) => canvas.hasPointerCapture(event.pointerId) && point(event));
    canvas.addEventListener("pointerup", () => this.settle());
    canvas.addEventListener("wheel", (event) => {
      event.preventDefault();
      this.moveTo(plane.axis, this.at[plane.axis] + (event.deltaY < 0 ? 1 : -1));
    }, { passive: false });
    canvas.addEventListener("keydown", (event) => {
      const right = this.mirrored(plane) ? -1 : 1;
      const step = { ArrowRight: [plane.across, right], ArrowLeft: [plane.across, -right], ArrowUp: [plane.up, 1],
        ArrowDown: [plane.up, -1], PageUp: [plane.axis, 1], PageDown: [plane.axis, -1] }[event.key];
      if (!step) return;
      event.preventDefault();
      this.moveTo(step[0], this.at[step[0]] + step[1]);
    });
  }

  inside(axis, value) {
    return Math.min(Math.max(Math.round(value), 0), this.shape[axis] - 1);
  }

  moveTo(axis, value) {
    this.at[axis] = this.inside(axis, value);
    this.settle();
  }

  settle() {  // with a zoom the planes follow the crosshair, but not under the pointer
    this.centre = [...this.at];
    this.draw();
  }

  mirrored(plane) {
    return this.settings.mirror && plane.across === 0;
  }

  // Scale and shift from voxels to pixels of the square canvas; one millimetre is as long in all planes.
  frame(plane, side) {
    const { spacing } = this.volume;
    const widest = Math.max(...this.shape.map((n, a) => n * spacing[a]));
    const perMm = (side / widest) * this.settings.zoom;
    const middle = (axis) => (this.settings.zoom > 1 ? this.centre[axis] + 0.5 : this.shape[axis] / 2);
    const scale = [perMm * spacing[plane.across], perMm * spacing[plane.up]];
    return { scale, left: side / 2 - scale[0] * middle(plane.across), bottom: side / 2 - scale[1] * middle(plane.up) };
  }

  voxelAt(plane, right, down) {
    const { scale, left, bottom } = this.frame(plane, 1);
    const across = this.mirrored(plane) ? 1 - right : right;
    return [(across - left) / scale[0] - 0.5, (1 - down - bottom) / scale[1] - 0.5];
  }

  paint(plane) {
    const { image, codes, grey, top, shape, volume } = this;
    const { outline, opacity } = this.settings;
    const stride = [1, shape[0], shape[0] * shape[1]];
    const [across, up] = [stride[plane.across], stride[plane.up]];
    const [width, height] = [shape[plane.across], shape[plane.up]];
    const first = this.at[plane.axis] * stride[plane.axis];
    const out = plane.data.data;
    for (let v = 0, o = 0; v < height; v++) {
      let from = first + (height - 1 - v) * up;
      for (let u = 0; u < width; u++, o += 4, from += across) {
        const value = grey[image[from]];
        const label = top[codes[from]];
        let part = 0;
        if (label) {
          const rim = outline && (u === 0 || u === width - 1 || v === 0 || v === height - 1 || top[codes[from - across]] !== label
            || top[codes[from + across]] !== label || top[codes[from - up]] !== label || top[codes[from + up]] !== label);
          part = outline ? (rim ? Math.min(1, opacity + 0.4) : 0) : opacity;
        }
        const colour = label ? volume.labels[label - 1].colour : [0, 0, 0];
        out[o] = value + part * (colour[0] - value);
        out[o + 1] = value + part * (colour[1] - value);
        out[o + 2] = value + part * (colour[2] - value);
        out[o + 3] = 255;
      }
    }
    plane.pixels.getContext("2d").putImageData(plane.data, 0, 0);
  }

  drawPlane(plane) {
    const { canvas } = plane;
    const side = Math.max(1, Math.round(canvas.clientWidth * devicePixelRatio));
    if (canvas.width !== side || canvas.height !== side) [canvas.width, canvas.height] = [side, side];
    this.paint(plane);
    const pen = canvas.getContext("2d");
    const { scale, left, bottom } = this.frame(plane, side);
    const [width, height] = [scale[0] * plane.pixels.width, scale[1] * plane.pixels.height];
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, side, side);
    if (this.mirrored(plane)) pen.setTransform(-1, 0, 0, 1, side, 0);
    pen.imageSmoothingEnabled = scale[0] < 6 * devicePixelRatio;
    pen.drawImage(plane.pixels, left, side - bottom - height, width, height);
    if (this.settings.cross) this.drawCross(pen, plane, side, { scale, left, bottom });
    pen.setTransform(1, 0, 0, 1, 0, 0);
    this.drawLetters(pen, plane, side);
    plane.slider.value = this.at[plane.axis];
    plane.figure.querySelector("output").textContent = `${this.at[plane.axis] + 1} / ${this.shape[plane.axis]}`;
  }

  drawCross(pen, plane, side, { scale, left, bottom }) {
    const x = Math.round(left + scale[0] * (this.at[plane.across] + 0.5)) + 0.5;
    const y = Math.round(side - bottom - scale[1] * (this.at[plane.up] + 0.5)) + 0.5;
    const gap = 7 * devicePixelRatio;
    pen.strokeStyle = "rgba(255, 214, 74, 0.8)";
    pen.lineWidth = devicePixelRatio;
    pen.beginPath();
    for (const [from, to] of [[0, x - gap], [x + gap, side]]) pen.moveTo(from, y), pen.lineTo(to, y);
    for (const [from, to] of [[0, y - gap], [y + gap, side]]) pen.moveTo(x, from), pen.lineTo(x, to);
    pen.stroke();
  }

  drawLetters(pen, plane, side) {
    const [left, right, bottom, top] = this.mirrored(plane) ? [1, 0, 2, 3].map((n) => plane.ends[n]) : plane.ends;
    const edge = 9 * devicePixelRatio;
    pen.fillStyle = "rgba(255, 255, 255, 0.75)";
    pen.font = `600 ${11 * devicePixelRatio}px system-ui, sans-serif`;
    pen.textAlign = "center";
    pen.textBaseline = "middle";
    for (const [letter, x, y] of [[left, edge, side / 2], [right, side - edge, side / 2], [top, side / 2, edge], [bottom, side / 2, side - edge]]) {
      pen.fillText(letter, x, y);
    }
  }

  // -- labels and controls ------------------------------------------------------------------------------------------

  addLabels() {
    const list = this.root.querySelector(".labels ul");
    const boxes = this.volume.labels.map((label, number) => {
      const [item, box, swatch, name, ml] = ["li", "input", "span", "button", "span"].map((kind) => document.createElement(kind));
      Object.assign(box, { type: "checkbox", checked: true });
      box.setAttribute("aria-label", `show ${label.name}`);
      box.addEventListener("change", () => {
        this.visible[number] = box.checked;
        this.refresh();
      });
      swatch.className = "swatch";
      swatch.style.backgroundColor = `rgb(${label.colour.join(",")})`;
      Object.assign(name, { type: "button", className: "name", textContent: label.name, disabled: !label.centre });
      name.title = label.centre ? `${label.name}: go there` : `${label.name}: not found`;
      name.addEventListener("click", () => {
        this.at = [...label.centre];
        this.settle();
      });
      Object.assign(ml, { className: "ml", textContent: label.centre ? label.ml : "not found" });
      item.append(box, swatch, name, ml);
      list.append(item);
      return box;
    });
    for (const [act, shown] of [["all", true], ["none", false]]) {
      this.root.querySelector(`[data-act=${act}]`).addEventListener("click", () => {
        boxes.forEach((box) => (box.checked = shown));
        this.visible.fill(shown);
        this.refresh();
      });
    }
    this.root.querySelector(".filter")?.addEventListener("input", (event) => {
      const wanted = event.target.value.trim().toLowerCase();
      [...list.children].forEach((item, n) => (item.hidden = !this.volume.labels[n].name.toLowerCase().includes(wanted)));
    });
  }

  addControls() {
    const field = (name) => this.root.querySelector(`[data-set=${name}]`);
    const levels = this.volume.levels;
    const nearest = (value) => levels.reduce((best, level, n) => (Math.abs(level - value) < Math.abs(levels[best] - value) ? n : best), 0);
    const showWindow = () => ["low", "high"].forEach((name) => (field(name).value = nearest(this.settings[name])));
    for (const name of ["low", "high"]) {
      field(name).addEventListener("input", () => {
        this.settings[name] = levels[Number(field(name).value)];
        this.refresh();
      });
    }
    field("opacity").addEventListener("input", () => this.set("opacity", Number(field("opacity").value) / 100));
    field("zoom").addEventListener("input", () => this.set("zoom", Number(field("zoom").value)));
    for (const name of ["outline", "cross", "mirror"]) field(name).addEventListener("change", () => this.set(name, field(name).checked));
    for (const [name, [low, high]] of Object.entries(this.volume.windows)) {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: name });
      button.addEventListener("click", () => {
        Object.assign(this.settings, { low, high });
        showWindow();
        this.refresh();
      });
      this.root.querySelector(".presets").append(button);
    }
    showWindow();
  }

  set(name, value) {
    this.settings[name] = value;
    this.settle();
  }
}

async function show(root) {
  const status = root.querySelector(".status");
  try {
    const volume = JSON.parse(root.querySelector("script").textContent);
    const [image, codes] = await Promise.all([unpacked(volume.image), unpacked(volume.codes)]);
    new Viewer(root, volume, new Uint8Array(image), volume.bytes === 1 ? new Uint8Array(codes) : new Uint16Array(codes));
    status.hidden = true;
    root.dataset.ready = "yes";
  } catch (error) {
    status.textContent = `The slices cannot be shown: ${error.message}.`;
  }
}

document.querySelectorAll(".slices").forEach(show);
