/** Small pieces of the page that only show. */

import { toRgba, type Check, type Decision, type Image } from "../runtime/index.js";
import type { Problem } from "./messages.js";

export function byId<E extends HTMLElement = HTMLElement>(id: string): E {
  return document.getElementById(id) as E;
}

export function cell<K extends keyof HTMLElementTagNameMap>(tag: K, text: string): HTMLElementTagNameMap[K] {
  return Object.assign(document.createElement(tag), { textContent: text });
}

/** Shows a picture on the stage; `words` for people who do not see it. */
export function paint(image: Image, words: string): void {
  const canvas = byId<HTMLCanvasElement>("picture");
  [canvas.width, canvas.height] = [image.width, image.height];
  canvas.getContext("2d")?.putImageData(toRgba(image), 0, 0);
  canvas.setAttribute("aria-label", words);
}

/** What went wrong, what would have been right, what to do; null takes it away. */
export function showProblem(problem: Problem | null, again: (() => void) | null): void {
  const box = byId("problem");
  box.hidden = problem === null;
  if (problem === null) return;
  const sentence = (text: string): string => `${text.charAt(0).toUpperCase()}${text.slice(1)}.`;
  const lines = [sentence(problem.came), sentence(problem.fix), ...(problem.allowed === "" ? [] : [`Allowed: ${problem.allowed}.`])];
  box.replaceChildren(...lines.map((line) => cell("p", line)));
  if (again === null) return;
  const button = Object.assign(cell("button", "Try again"), { type: "button", id: "again" });
  button.onclick = () => {
    box.hidden = true;
    again();
  };
  box.append(button);
}

export function describeDecision(policy: string, { reason, steps, width, guidance_until, capped, assumed }: Decision): string {
  const given = [`${steps} steps`, ...(width === 1 ? [] : [`width ${width}`]), ...(guidance_until === 1 ? [] : [`guidance to ${Math.round(guidance_until * 100)} %`])];
  const less = capped.length === 0 ? "" : ` Otherwise than the table says, by your limits or what this model has: ${capped.join(", ")}.`;
  const guessed = assumed.length === 0 ? "" : ` Not known here, taken as well: ${assumed.join(", ").replaceAll("_", " ")}.`;
  return `${policy}: ${reason} So ${given.join(", ")}.${less}${guessed}`;
}

export function describeCheck({ what, value, wanted, unit, ceiling, passed }: Check): HTMLTableRowElement {
  const row = document.createElement("tr");
  const figure = (x: number): string => (unit === "of 1" ? x.toFixed(5) : unit.startsWith("dB") ? x.toFixed(1) : String(Math.round(x * 100) / 100));
  const bound = wanted === null ? "" : `${ceiling ? "at most" : "at least"} ${figure(wanted)}`;
  row.append(cell("td", what.replaceAll("_", " ")), cell("td", `${figure(value)} ${unit}`), cell("td", bound), cell("td", passed ? "ok" : "FAILED"));
  if (!passed) row.lastElementChild?.classList.add("failed");
  return row;
}
