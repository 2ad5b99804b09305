// Types from the JSON Schemas that scripts/schemas.py wrote: src/runtime/generated/*.ts. `--check` compares instead.
import { readFile, writeFile } from "node:fs/promises";
import { compile } from "json-schema-to-typescript";

const folder = new URL("../src/runtime/generated/", import.meta.url);
const ROOTS = { manifest: "Manifest", policy: "Policy", golden: "Facts" };

/** A reader gets every field, defaults filled in; tuples in the form the generator knows. */
function read(schema) {
  if (Array.isArray(schema)) return schema.map(read);
  if (schema === null || typeof schema !== "object") return schema;
  const { title, default: _default, ...rest } = schema;
  const made = Object.fromEntries(Object.entries(rest).map(([key, value]) => [key, read(value)]));
  if (rest.properties) {
    // `properties` maps names to schemas: a field may itself be called "title" or "default".
    made.properties = Object.fromEntries(Object.entries(rest.properties).map(([key, value]) => [key, read(value)]));
    made.required = Object.keys(rest.properties);
    made.additionalProperties = false;
  }
  if (rest.prefixItems) {
    made.items = made.prefixItems;
    made.additionalItems = false;
    delete made.prefixItems;
  } else if (rest.type === "array") {
    // Lengths are checked when a file is read; as types they would be unions of tuples.
    delete made.minItems;
    delete made.maxItems;
  }
  return made;
}

let stale = 0;
for (const [name, root] of Object.entries(ROOTS)) {
  const schema = read(JSON.parse(await readFile(new URL(`${name}.schema.json`, folder), "utf8")));
  const made = await compile({ ...schema, title: root }, root, {
    bannerComment: `// Made by \`npm run generate\` from ${name}.schema.json; not edited by hand.`, style: { printWidth: 120 },
  });
  const file = new URL(`${name}.ts`, folder);
  if (process.argv.includes("--check")) stale += (await readFile(file, "utf8").catch(() => "")) === made ? 0 : 1;
  else await writeFile(file, made);
}
if (stale > 0) {
  console.error(`${stale} generated files are not current. Run: npm run generate`);
  process.exit(1);
}
