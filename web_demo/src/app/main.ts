/** The page: reads the form, tells the worker, shows what comes of it. */

import { browserSensors, megabytes, settingsFromJson, type DeviceState, type Sensors, type Settings, type Thermal } from "../runtime/index.js";
import type { Drawn, Opened, Problem, Reply, Request, Wish } from "./messages.js";
import { StartEditor } from "./start.js";
import { byId, cell, describeCheck, describeDecision, paint, showProblem } from "./view.js";

const ADDRESS = new URL(new URLSearchParams(location.search).get("bundle") ?? "./bundle/", location.href).href;
const EXAMPLE = "a red circle above a blue square on a white background";
const worker = new Worker(new URL("./worker.ts", import.meta.url), { type: "module" });
const say = (request: Request): void => worker.postMessage(request);

const input = (id: string): HTMLInputElement => byId<HTMLInputElement>(id);
const select = (id: string): HTMLSelectElement => byId<HTMLSelectElement>(id);
const button = (id: string): HTMLButtonElement => byId<HTMLButtonElement>(id);
const prompt = byId<HTMLTextAreaElement>("prompt");
const status = byId("status");
const bar = byId<HTMLProgressElement>("progress");

type Phase = "opening" | "ready" | "drawing" | "paused" | "testing" | "broken";
let phase: Phase = "opening";
let opened: Opened | null = null;
let drawn: Drawn | null = null;
let sensors: Sensors | null = null;
let retry: Request | null = null;
const start = new StartEditor((problem) => tell(problem, null), useRecord);

// ---- what the page knows of its state -----------------------------------------------------------------------------

function enter(next: Phase, words: string): void {
  phase = next;
  status.textContent = words;
  const busy = next === "drawing" || next === "paused" || next === "testing";
  button("draw").disabled = next !== "ready";
  button("pause").disabled = next !== "drawing" && next !== "paused";
  button("pause").textContent = next === "paused" ? "Resume" : "Pause";
  button("cancel").disabled = !busy && next !== "opening";
  button("selftest").disabled = next !== "ready";
  button("save").disabled = drawn === null || busy;
  document.body.dataset.phase = next;
}

function openBundle(): void {
  bar.value = 0;
  enter("opening", "Opening…");
  const wish: Wish = {
    address: ADDRESS, form: select("form").value as Wish["form"], threads: Number(select("threads").value || 0), frugal: input("frugal").checked,
    precision: select("precision").value,
  };
  retry = { type: "open", wish };
  say(retry);
}

function settings(): Partial<Settings> & { prompt: string } {
  return {
    prompt: prompt.value, negative_prompt: input("negative").value, seed: input("seed").valueAsNumber || 0,
    num_inference_steps: stepCounts()[input("steps").valueAsNumber] ?? 1, sampler: select("sampler").value,
    guidance_scale: input("guidance").valueAsNumber, width: Number(select("width").value || 1), strength: start.strength,
  };
}

/** The slider runs over the counts that the bundle has, whatever gaps are between them. */
function stepCounts(): number[] {
  return opened?.samplers[select("sampler").value] ?? [1];
}

function setSteps(wanted: number): void {
  const counts = stepCounts();
  const nearest = counts.reduce((best, n) => (Math.abs(n - wanted) < Math.abs(best - wanted) ? n : best), counts[0] as number);
  Object.assign(input("steps"), { min: "0", max: String(counts.length - 1), value: String(counts.indexOf(nearest)) });
  showNumbers();
}

function showNumbers(): void {
  byId("steps-shown").textContent = String(stepCounts()[input("steps").valueAsNumber] ?? "");
  byId("guidance-shown").textContent = input("guidance").valueAsNumber <= 1 ? "off" : input("guidance").value;
  byId("battery-shown").textContent = `${input("battery").value} %`;
}

/** What the sensors say where they are asked, what the sliders say otherwise. */
function device(): Partial<DeviceState> {
  const asked = input("measured").checked;
  const measured = asked ? sensors?.read() : undefined;
  return {
    ...measured,
    ...(!(asked && sensors?.has.battery) && { battery: input("battery").valueAsNumber / 100, charging: input("charging").checked }),
    ...(!(asked && sensors?.has.thermal) && { thermal: select("thermal").value as Thermal }),
  };
}

function showSensors(): void {
  const asked = input("measured").checked;
  const [battery, thermal] = [asked && sensors?.has.battery === true, asked && sensors?.has.thermal === true];
  const source = (known: boolean): string => (known ? "(measured)" : asked ? "(not measured here: say it)" : "(as you say)");
  byId("battery-source").textContent = source(battery);
  byId("thermal-source").textContent = source(thermal);
  for (const id of ["battery", "charging"]) input(id).disabled = battery;
  select("thermal").disabled = thermal;
  byId("measured-field").hidden = sensors !== null && !sensors.has.battery && !sensors.has.thermal;
  const now = asked ? sensors?.read() : undefined;
  if (battery && now?.battery != null) input("battery").value = String(Math.round(now.battery * 100));
  if (battery) input("charging").checked = now?.charging === true;
  if (thermal && now?.thermal !== undefined) select("thermal").value = now.thermal;
}

function policyName(): string | null {
  return select("policy").value === "" ? null : select("policy").value;
}

function tellDevice(): void {
  showSensors();
  showNumbers();
  if (policyName() === null) byId("decision").textContent = "";
  const { prompt: _prompt, ...rest } = settings();
  say({ type: "device", device: device(), policy: policyName(), settings: rest });
}

/** Form fields from a picture's record. */
function useRecord(record: Record<string, unknown>): void {
  const s = settingsFromJson(record.settings);
  prompt.value = s.prompt;
  input("negative").value = s.negative_prompt;
  input("seed").value = String(s.seed);
  if (opened !== null && s.sampler in opened.samplers) select("sampler").value = s.sampler;
  setSteps(s.num_inference_steps);
  input("guidance").value = String(s.guidance_scale);
  if (opened?.widths.includes(s.width) === true) select("width").value = String(s.width);
  showNumbers();
}

// ---- what the worker says -----------------------------------------------------------------------------------------

worker.onmessage = ({ data }: MessageEvent<Reply>) => {
  switch (data.type) {
    case "download":
      bar.value = data.done / Math.max(data.total, 1);
      status.textContent = `Getting the model: ${megabytes(data.done)} of ${megabytes(data.total)}`;
      break;
    case "opened":
      showOpened(data.opened);
      break;
    case "loading":
      if (phase === "drawing") status.textContent = `Opened ${data.role.replaceAll("_", " ")}`;
      break;
    case "step":
      paint(data.preview, `Preview after step ${data.row + 1} of ${data.rows}`);
      bar.value = (data.row + 1) / data.rows;
      status.textContent = `Step ${data.row + 1} of ${data.rows}, ${data.seconds.toFixed(2)} s each`;
      break;
    case "paused":
      enter("paused", data.lasting ? "Paused. It stays here, also when this page is closed." : "Paused, as long as this page is open.");
      break;
    case "drawn":
      showDrawn(data.drawn);
      break;
    case "decision":
      byId("decision").textContent = describeDecision(data.policy, data.decision);
      break;
    case "check":
      byId("checks").querySelector("tbody")?.append(describeCheck(data.check));
      break;
    case "tested":
      enter("ready", `Self-test ${data.passed ? "passed" : "FAILED"} in ${data.seconds.toFixed(1)} s`);
      break;
    case "idle":
      bar.value = 0;
      if (data.why === "cleared") {
        opened = null;
        enter("broken", "The stored model is deleted. Reload the page to get it again.");
      } else if (opened === null) tell({ came: "the download was stopped", allowed: "the whole model", fix: "Try again: it goes on where it stopped" }, retry);
      else enter("ready", "Cancelled");
      break;
    case "problem":
      tell(data.problem, data.during === "open" ? retry : null);
  }
};
worker.onerror = (event) => {
  const came = event.message === undefined || event.message === "" ? "the worker did not start" : event.message;
  tell({ came, allowed: "a browser of the last two years", fix: "Reload the page, or use a newer browser" }, null);
};

function tell(problem: Problem, again: Request | null): void {
  showProblem(problem, again === null ? null : () => {
    enter("opening", "Trying again…");
    say(again);
  });
  bar.value = 0;
  enter(opened === null ? "broken" : "ready", "");
}

function showOpened(now: Opened): void {
  opened = now;
  const [height, width] = now.sizePx;
  byId("model").textContent = `${now.name}, ${width}x${height} px`;
  const facts = [now.form === "wasm" ? `WASM, ${now.threads} thread${now.threads > 1 ? "s" : ""}` : "WebGPU", now.precision, megabytes(now.storedBytes)];
  if (now.frugal) facts.push("one component at a time");
  if (now.offline) facts.push("offline");
  byId("facts").replaceChildren(...facts.map((fact) => cell("li", fact)), ...now.warnings.map((text) => Object.assign(cell("li", text.split(":")[0] as string), { className: "warn", title: text })));
  fill(select("sampler"), Object.keys(now.samplers), now.defaults.sampler);
  fill(select("width"), now.widths.map(String), String(now.widths[0]));
  fill(select("policy"), ["", ...now.policies], select("policy").value, (name) => (name === "" ? "off" : name));
  fill(select("precision"), ["", ...now.precisions], select("precision").value, (name) => (name === "" ? "the bundle's first" : name));
  fill(select("threads"), ["0", ...Array.from({ length: navigator.hardwareConcurrency || 1 }, (_, i) => String(i + 1))], select("threads").value || "0", (n) => (n === "0" ? "all" : n));
  byId("width-field").hidden = now.widths.length < 2;
  byId("precision-field").hidden = now.precisions.length < 2;
  byId("start").hidden = !now.canStart;
  input("guidance").value = String(now.defaults.guidance);
  setSteps(now.defaults.steps);
  if (prompt.value === "") prompt.value = now.prompts[0] ?? EXAMPLE;
  start.resizeTo(width, height);
  const picture = byId<HTMLCanvasElement>("picture");
  if (drawn === null) [picture.width, picture.height] = [width, height];
  picture.style.aspectRatio = `${width} / ${height}`;
  showProblem(null, null);
  byId("notes").replaceChildren(...now.warnings.map((text) => cell("p", text)));
  bar.value = 0;
  enter("ready", now.saved === null ? "Ready" : "");
  if (now.saved !== null) offerSaved(now.saved);
  tellDevice();
}

function fill(list: HTMLSelectElement, values: string[], chosen: string, shown = (value: string): string => value): void {
  list.replaceChildren(...values.map((value) => new Option(shown(value), value, false, value === chosen)));
}

function offerSaved(words: string): void {
  const go = Object.assign(cell("button", "Go on with it"), { type: "button", id: "resume-saved", onclick: () => begin({ type: "resume-saved" }) });
  const drop = Object.assign(cell("button", "Let it go"), {
    type: "button",
    onclick: () => {
      say({ type: "discard-saved" });
      enter("ready", "Ready");
    },
  });
  status.replaceChildren(`A paused picture waits: “${words.slice(0, 60)}” `, go, " ", drop);
}

function showDrawn(now: Drawn): void {
  drawn = now;
  paint(now.image, `Picture: ${now.settings.prompt}`);
  const { settings: s } = now;
  const figures: Record<string, string> = {
    "a step": `${now.secondsPerStep.toFixed(3)} s`, "in all": `${now.seconds.toFixed(1)} s, ${now.calls} UNet calls`,
    settings: `seed ${s.seed}, ${s.num_inference_steps} steps of ${s.sampler}, guidance ${s.guidance_scale}${s.width === 1 ? "" : `, width ${s.width}`}`,
    backend: byId("facts").firstElementChild?.textContent ?? "",
  };
  byId("figures").replaceChildren(...Object.entries(figures).flatMap(([name, value]) => [cell("dt", name), cell("dd", value)]));
  const cut = now.truncated === "" ? [] : [`Cut off, did not fit: ${now.truncated}`];
  byId("notes").replaceChildren(...[...(opened?.warnings ?? []), ...now.notes, ...cut].map((text) => cell("p", text)));
  bar.value = 1;
  enter("ready", "Done");
  void showMemory();
}

/** What the page and its workers hold, where the browser tells. */
async function showMemory(): Promise<void> {
  const measure = (performance as { measureUserAgentSpecificMemory?: () => Promise<{ bytes: number }> }).measureUserAgentSpecificMemory;
  if (!crossOriginIsolated || measure === undefined) return;
  const { bytes } = await measure.call(performance);
  byId("figures").append(cell("dt", "memory"), cell("dd", megabytes(bytes)));
}

// ---- what people do -----------------------------------------------------------------------------------------------

function begin(request: Request): void {
  if (phase !== "ready") return;
  showProblem(null, null);
  bar.value = 0;
  enter("drawing", "Reading the prompt…");
  say(request);
}

byId<HTMLFormElement>("settings").onsubmit = (event) => {
  event.preventDefault();
  begin({ type: "draw", job: { settings: settings(), start: start.start(), policy: policyName(), device: device() } });
};
button("pause").onclick = () => {
  if (phase !== "paused") return say({ type: "pause" });
  enter("drawing", "Going on…");
  say({ type: "resume" });
};
button("cancel").onclick = () => say({ type: "cancel" });
button("dice").onclick = () => (input("seed").value = String(crypto.getRandomValues(new Uint32Array(1))[0]));
button("save").onclick = () => {
  if (drawn === null) return;
  const link = Object.assign(document.createElement("a"), { href: URL.createObjectURL(drawn.png), download: `edgesd-${drawn.settings.seed}.png` });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
};
button("selftest").onclick = () => {
  byId("checks").hidden = false;
  byId("checks").querySelector("tbody")?.replaceChildren();
  enter("testing", "Repeating the recorded run…");
  say({ type: "selftest" });
};
button("clear").onclick = () => say({ type: "clear" });
for (const id of ["form", "threads", "frugal", "precision"]) byId(id).onchange = openBundle;
select("sampler").onchange = () => setSteps(Number(byId("steps-shown").textContent));
for (const id of ["steps", "guidance", "battery", "charging", "thermal", "measured", "policy", "width", "sampler"]) byId(id).addEventListener("input", tellDevice);
document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) byId<HTMLFormElement>("settings").requestSubmit();
  if (event.key === "Escape" && !button("cancel").disabled) say({ type: "cancel" });
});

async function begins(): Promise<void> {
  sensors = await browserSensors(tellDevice);
  showSensors();
  openBundle();
  if ("serviceWorker" in navigator && import.meta.env.PROD) await navigator.serviceWorker.register("./sw.js");
}
void begins();
