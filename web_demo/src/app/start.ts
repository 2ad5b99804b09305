/** The start image: dropped or chosen, with a brush that says what is to be drawn anew. */

import { EdgesdError, decodeImage, describeError, readSettings, toRgba, type Image, type Start } from "../runtime/index.js";
import type { Problem } from "./messages.js";
import { byId } from "./view.js";

export class StartEditor {
  private file: Blob | null = null;
  private image: Image | null = null;
  private size: [number, number] = [128, 128];
  private painted = false;
  private cursor: [number, number] = [0, 0];
  private readonly brush = byId<HTMLCanvasElement>("brush");

  constructor(
    private readonly failed: (problem: Problem) => void,
    private readonly reuse: (record: Record<string, unknown>) => void,
  ) {
    const input = byId<HTMLInputElement>("file");
    input.onchange = () => void this.take(input.files?.[0] ?? null);
    byId("unstart").onclick = () => this.drop();
    byId("wipe").onclick = () => this.wipe();
    for (const id of ["strength", "size"]) byId(id).addEventListener("input", () => this.showNumbers());
    this.listenToDrops();
    this.listenToBrush();
    this.showNumbers();
  }

  get strength(): number {
    return this.image === null ? 1 : byId<HTMLInputElement>("strength").valueAsNumber;
  }

  /** The model's size; a picture that is there is fitted anew. */
  resizeTo(width: number, height: number): void {
    if (this.size.join() === [width, height].join()) return;
    this.size = [width, height];
    if (this.file !== null) void this.take(this.file);
  }

  /** What the run starts from; null without a picture. */
  start(): Start | null {
    if (this.image === null) return null;
    return { image: this.image, mask: this.painted ? this.mask() : null };
  }

  private async take(file: Blob | null): Promise<void> {
    if (file === null) return;
    try {
      const image = await decodeImage(file, ...this.size);
      [this.file, this.image] = [file, image];
    } catch (error) {
      const bad = error instanceof EdgesdError ? error : { came: describeError(error), allowed: "a picture", fix: "Give another file" };
      this.failed({ came: bad.came, allowed: bad.allowed, fix: bad.fix });
      return;
    }
    const source = byId<HTMLCanvasElement>("source");
    for (const canvas of [source, this.brush]) [canvas.width, canvas.height] = this.size;
    source.getContext("2d")?.putImageData(toRgba(this.image), 0, 0);
    this.wipe();
    byId("editor").hidden = false;
    await this.offerSettings(file);
  }

  /** A picture of edgesd's own brings its settings along. */
  private async offerSettings(file: Blob): Promise<void> {
    const button = byId("reuse");
    try {
      const record = readSettings(new Uint8Array(await file.arrayBuffer()));
      button.hidden = false;
      button.onclick = () => {
        try {
          this.reuse(record);
          this.drop();
        } catch (error) {
          const { came, allowed, fix } = error as EdgesdError;
          this.failed({ came, allowed, fix });
        }
      };
    } catch {
      button.hidden = true;
    }
  }

  private drop(): void {
    [this.file, this.image] = [null, null];
    byId<HTMLInputElement>("file").value = "";
    byId("editor").hidden = true;
  }

  private wipe(): void {
    this.painted = false;
    this.brush.getContext("2d")?.clearRect(0, 0, this.brush.width, this.brush.height);
  }

  private mask(): Float32Array {
    const pixels = this.brush.getContext("2d")?.getImageData(0, 0, this.brush.width, this.brush.height).data as Uint8ClampedArray;
    return Float32Array.from({ length: pixels.length / 4 }, (_, i) => ((pixels[i * 4 + 3] as number) >= 128 ? 1 : 0));
  }

  private dab(x: number, y: number): void {
    const context = this.brush.getContext("2d");
    if (context === null) return;
    context.fillStyle = "#ff2d6f";
    context.beginPath();
    context.arc(x, y, byId<HTMLInputElement>("size").valueAsNumber / 2, 0, 2 * Math.PI);
    context.fill();
    this.painted = true;
  }

  private listenToBrush(): void {
    const at = (event: PointerEvent): [number, number] => {
      const box = this.brush.getBoundingClientRect();
      return [((event.clientX - box.left) / box.width) * this.brush.width, ((event.clientY - box.top) / box.height) * this.brush.height];
    };
    this.brush.onpointerdown = (event) => {
      this.brush.setPointerCapture(event.pointerId);
      this.dab(...at(event));
    };
    this.brush.onpointermove = (event) => {
      if (event.buttons > 0) for (const one of event.getCoalescedEvents?.() ?? [event]) this.dab(...at(one));
    };
    const moves: Record<string, [number, number]> = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1], " ": [0, 0] };
    this.brush.onkeydown = (event) => {
      const move = moves[event.key];
      if (move === undefined) return;
      event.preventDefault();
      const step = byId<HTMLInputElement>("size").valueAsNumber / 2;
      this.cursor = [
        Math.min(Math.max(this.cursor[0] + move[0] * step, 0), this.brush.width), Math.min(Math.max(this.cursor[1] + move[1] * step, 0), this.brush.height),
      ];
      if (event.key === " " || event.shiftKey) this.dab(...this.cursor);
    };
  }

  private listenToDrops(): void {
    const zone = byId("drop");
    for (const kind of ["dragenter", "dragover", "dragleave", "drop"]) {
      document.addEventListener(kind, (event) => {
        event.preventDefault();
        zone.classList.toggle("over", kind === "dragenter" || kind === "dragover");
      });
    }
    document.addEventListener("drop", (event) => void this.take(event.dataTransfer?.files[0] ?? null));
    document.addEventListener("paste", (event) => void this.take(event.clipboardData?.files[0] ?? null));
  }

  private showNumbers(): void {
    byId("strength-shown").textContent = byId<HTMLInputElement>("strength").value;
    byId("size-shown").textContent = `${byId<HTMLInputElement>("size").value} px`;
  }
}
