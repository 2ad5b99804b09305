"""Manifests for the readers of every language: what each must refuse and why, and what it must take."""

from __future__ import annotations

import base64
import copy
import json
from typing import Any

from bundles import MODEL

from edgesd.manifest import MAX_BUNDLE_BYTES, MAX_MANIFEST_BYTES, MAX_VALUES

# What Python's message says, by the kind of reason a case names.
KINDS = {
    "size": "bytes. Allowed: up to",
    "values": "values. Allowed: up to",
    "json": "does not parse",
    "duplicate": "appears twice",
    "number": "is not a number|beyond 2\\^53|not JSON compliant",
    "format": "has no format|bundle format",
    "critical": "features this edgesd lacks",
    "path": "a path must|RelPath|at least 1 char|at most 512",
    "files": "listed twice|lists itself|not listed|bytes together",
    "schema": "manifest.json: ",
}
_SHA = "0" * 64
BASE: dict[str, Any] = {
    "format": "1.0",
    "target": "tflite",
    "model": MODEL,
    "components": [
        {
            "name": "unet",
            "variants": [
                {
                    "axes": {"size_px": [16, 16]},
                    "files": ["unet/unet.bin"],
                    "inputs": [{"name": "sample", "dtype": "float32", "shape": [1, 4, 2, 2]}],
                    "outputs": [{"name": "model_output", "dtype": "float32", "shape": [1, 4, 2, 2]}],
                    "snr_db": 120.5,
                }
            ],
        },
        {
            "name": "vae_decoder",
            "variants": [
                {
                    "axes": {"size_px": [16, 16]},
                    "files": ["decoder.bin"],
                    "inputs": [{"name": "latents", "dtype": "float32", "shape": [1, 4, 2, 2]}],
                    "outputs": [{"name": "image", "dtype": "float32", "shape": [1, 3, 16, 16]}],
                }
            ],
        },
    ],
    "samplers": [{"name": "ddim", "file": "samplers.safetensors", "steps": [1, 4]}],
    "provenance": {"source": "tests", "sha256": _SHA},
    "files": [
        {"path": path, "bytes": 8, "sha256": _SHA}
        for path in ("unet/unet.bin", "decoder.bin", "tokenizer.json", "samplers.safetensors")
    ],
}
UNET = ("components", 0, "variants", 0)


def edited(*where: str | int, to: Any) -> str:
    """The base with one value set, as text; "-" removes it."""
    raw = copy.deepcopy(BASE)
    at: Any = raw
    for step in where[:-1]:
        at = at[step]
    if to == "-":
        del at[where[-1]]
    else:
        at[where[-1]] = to
    return json.dumps(raw, ensure_ascii=False)


def renamed(path: str) -> str:
    return json.dumps(BASE).replace('"decoder.bin"', json.dumps(path))


def spliced(extra: str) -> list[Any]:
    return [json.dumps(BASE)[:-1] + ", ", extra, "}"]


def _more(**entry: Any) -> list[dict[str, Any]]:
    return [*BASE["files"], {**BASE["files"][0], **entry}]


def _cases() -> list[tuple[str, str, Any]]:
    """(name, kind, text or its parts: text, (text, times) or bytes)."""
    path = {
        "parent": "../decoder.bin",
        "parent_inside": "unet/../../decoder.bin",
        "absolute": "/etc/passwd",
        "drive": "C:decoder.bin",
        "backslash": "..\\decoder.bin",
        "empty_part": "unet//decoder.bin",
        "dot_part": "./decoder.bin",
        "null_byte": "decoder.bin\0.png",
        "newline": "decoder.bin\n",
        "look_alike": "dеcoder.bin",
        "hidden": ".bashrc",
        "home": "~/decoder.bin",
        "trailing_dot": "decoder.bin.",
        "trailing_space": "unet /x",
        "device": "unet/NUL.onnx",
        "device_alone": "com1",
        "long": "/".join(["a"] * 300),
        "long_part": "a" * 129,
        "empty": "",
        "leading_space": " decoder.bin",
        "trailing_slash": "unet/",
    }
    found: list[tuple[str, str, Any]] = [(f"path_{name}", "path", renamed(value)) for name, value in path.items()]
    whole = json.dumps(BASE)
    found += [
        ("empty", "json", ""),
        ("cut", "json", whole[:700]),
        ("html", "json", "<html>404</html>"),
        ("list", "format", "[]"),
        ("text_behind", "json", whole + "x"),
        ("two_documents", "json", whole + whole),
        ("comment", "json", whole + "// done"),
        ("trailing_comma", "json", whole[:-1] + ",}"),
        ("single_quotes", "json", whole.replace('"', "'")),
        ("bare_key", "json", whole.replace('"format"', "format")),
        ("control_character", "json", whole.replace("tests", "te\nsts")),
        ("bad_escape", "json", whole.replace("tests", "te\\xsts")),
        ("leading_zero", "json", spliced('"later": 012')),
        ("plus_sign", "json", spliced('"later": +1')),
        ("hexadecimal", "json", spliced('"later": 0x10')),
        ("point_alone", "json", spliced('"later": 1.')),
        ("point_first", "json", spliced('"later": .5')),
        ("capital_true", "json", spliced('"later": True')),
        ("short_unicode_escape", "json", spliced('"later": "\\u12"')),
        ("nan", "number", spliced('"later": NaN')),
        ("infinity", "number", spliced('"later": -Infinity')),
        ("overflow", "number", spliced('"later": 1e999')),
        ("integer_2_53", "number", spliced('"later": 9007199254740992')),
        ("integer_negative_2_53", "number", spliced('"later": -9007199254740992')),
        ("integer_endless", "number", [json.dumps(BASE)[:-1] + ', "later": ', ("9", 100_000), "}"]),
        ("surrogate_high", "json", spliced('"later": "\\ud800"')),
        ("surrogate_low", "json", spliced('"later": "\\udc00x"')),
        ("surrogate_key", "json", spliced('"\\ud800": 1')),
        ("surrogates_swapped", "json", spliced('"later": "\\udc00\\ud800"')),
        ("bad_utf8", "json", [b'{"format": "1.0\xff"}']),
        ("overlong_utf8", "json", [b'{"format": "1.0\xc0\xaf"}']),
        ("utf8_surrogate", "json", [b'{"format": "1.0\xed\xa0\x80"}']),
        ("utf16", "json", [whole.encode("utf-16")]),
        ("byte_order_mark", "json", [b"\xef\xbb\xbf" + whole.encode()]),
        ("deep_lists", "json", [whole[:-1] + ', "later": ', ("[", 200_000), ("]", 200_000), "}"]),
        ("deep_objects", "json", [('{"a":', 100_000), "1", ("}", 100_000)]),
        ("many_bytes", "size", [whole[:-1] + ', "later": "', ("x", MAX_MANIFEST_BYTES), '"}']),
        ("many_values", "values", [whole[:-1] + ', "later": [0', (",0", MAX_VALUES + 1), "]}"]),
        ("duplicate_key", "duplicate", whole[:-1] + ', "target": "coreml"}'),
        ("duplicate_deep", "duplicate", spliced('"later": [{"a": {"b": 1, "b": 1}}]')),
        ("duplicate_escaped", "duplicate", spliced('"later": {"ab": 1, "a\\u0062": 1}')),
        ("no_format", "format", edited("format", to="-")),
        ("format_number", "format", edited("format", to=1.0)),
        ("newer_major", "format", edited("format", to="2.0")),
        ("no_minor", "format", edited("format", to="1")),
        ("format_spaces", "format", edited("format", to=" 1.0")),
        ("format_digits", "format", edited("format", to="١.0")),
        ("format_newline", "format", edited("format", to="1.0\n")),
        ("zero_major", "format", edited("format", to="0.9")),
        ("critical_unknown", "critical", edited("critical", to=["w4a8"])),
        ("critical_one_unknown", "critical", edited("critical", to=["chunked-prompts", "w4a8"])),
        ("critical_text", "critical", edited("critical", to="w4a8")),
        ("critical_null", "critical", edited("critical", to=None)),
        ("critical_case", "critical", edited("critical", to=["Prompt-Bank"])),
        ("critical_nested", "critical", edited("critical", to=[["x"]])),
        ("critical_object", "critical", edited("critical", to={"prompt-bank": 1})),
        ("critical_known_as_text", "schema", edited("critical", to="prompt-bank")),
        ("size_negative", "schema", edited("files", 0, "bytes", to=-1)),
        ("size_text", "schema", edited("files", 0, "bytes", to="8")),
        ("size_true", "schema", edited("files", 0, "bytes", to=True)),
        ("size_fraction", "schema", edited("files", 0, "bytes", to=8.5)),
        ("size_float", "schema", edited("files", 0, "bytes", to=8.0)),
        ("size_null", "schema", edited("files", 0, "bytes", to=None)),
        ("hash_upper_case", "schema", edited("files", 0, "sha256", to="A" * 64)),
        ("hash_short", "schema", edited("files", 0, "sha256", to="0" * 63)),
        ("hash_newline", "schema", edited("files", 0, "sha256", to=_SHA + "\n")),
        ("bundle_petabyte", "files", edited("files", 0, "bytes", to=MAX_BUNDLE_BYTES * 10)),
        ("shape_overflows", "schema", edited(*UNET, "inputs", 0, "shape", to=[1 << 24] * 8)),
        ("dimension_overflows", "schema", edited(*UNET, "inputs", 0, "shape", to=[1 << 31])),
        ("dimension_zero", "schema", edited(*UNET, "inputs", 0, "shape", to=[1, 0])),
        ("axes_thousand", "schema", edited(*UNET, "inputs", 0, "shape", to=[1] * 1000)),
        ("dtype_object", "schema", edited(*UNET, "inputs", 0, "dtype", to="object")),
        ("no_inputs", "schema", edited(*UNET, "inputs", to=[])),
        ("no_variants", "schema", edited("components", 0, "variants", to=[])),
        ("width_zero", "schema", edited(*UNET, "axes", "width", to=0)),
        ("width_two", "schema", edited(*UNET, "axes", "width", to=2)),
        ("width_text", "schema", edited(*UNET, "axes", "width", to="1")),
        ("batch_zero", "schema", edited(*UNET, "axes", "batch", to=0)),
        ("precision_unknown", "schema", edited(*UNET, "axes", "precision", to="int4")),
        ("chunk_of_three", "schema", edited(*UNET, "axes", "chunk", to=[0, 1, 2])),
        ("size_px_one", "schema", edited(*UNET, "axes", "size_px", to=[16])),
        ("status_unknown", "schema", edited(*UNET, "status", to="fine")),
        ("component_unknown", "schema", edited("components", 0, "name", to="\x1b[31mroot")),
        ("components_numbers", "schema", edited("components", to=[1, 2])),
        ("no_components", "schema", edited("components", to=[])),
        ("target_empty", "schema", edited("target", to="")),
        ("target_spaces", "schema", edited("target", to="a b")),
        ("name_newline", "schema", edited("model", "name", to="small\n")),
        ("name_long", "schema", edited("model", "name", to="a" * 129)),
        ("text_long", "schema", edited("provenance", "source", to="é" * 4097)),
        ("no_model", "schema", edited("model", to="-")),
        ("no_provenance", "schema", edited("provenance", to="-")),
        ("libraries_number", "schema", edited("provenance", "libraries", to={"torch": 2})),
        ("prediction_unknown", "schema", edited("model", "prediction_type", to="score")),
        ("scale_infinite", "number", edited("model", "latent", "scaling_factor", to=0.0).replace("0.0", "1e400")),
        ("scale_true", "schema", edited("model", "latent", "scaling_factor", to=True)),
        ("scale_text", "schema", edited("model", "latent", "scaling_factor", to="0.1")),
        ("rgb_bias_two", "schema", edited("model", "latent", "rgb_bias", to=[0.1, 0.2])),
        ("steps_zero", "schema", edited("samplers", 0, "steps", to=[0])),
        ("steps_none", "schema", edited("samplers", 0, "steps", to=[])),
        ("tokenizer_short", "schema", edited("model", "tokenizers", 0, "max_length", to=2)),
        ("chunks_many", "schema", edited("model", "tokenizers", 0, "chunks", to=17)),
        ("expand_one", "schema", edited("model", "tokenizers", 0, "expand", to=[[5, 1]])),
        ("five_tokenizers", "schema", edited("model", "tokenizers", to=BASE["model"]["tokenizers"] * 5)),
        ("noise_later", "schema", edited("noise", to={"version": 2})),
        ("noise_other", "schema", edited("noise", to={"generator": "mt19937"})),
        ("policy_name", "schema", edited("policies", to=[{"name": "Best", "file": "decoder.bin"}])),
        ("policy_twice", "files", edited("policies", to=[{"name": "a", "file": "decoder.bin"}] * 2)),
        ("policy_unlisted", "files", edited("policies", to=[{"name": "a", "file": "a.json"}])),
        ("unlisted", "files", edited(*UNET, "files", to=["unet/unet.bin", "other.bin"])),
        ("golden_unlisted", "files", edited("golden", to="golden.json")),
        ("plan_unlisted", "files", edited(*UNET, "plan", to="plan.json")),
        ("prompts_unlisted", "files", edited("prompts", to="prompts.safetensors")),
        ("listed_twice", "files", edited("files", to=_more())),
        ("differ_in_case", "files", edited("files", to=_more(path="UNET/unet.bin"))),
        ("lists_itself", "files", edited("files", to=_more(path="Manifest.json"))),
        ("component_twice", "files", edited("components", to=[BASE["components"][0]] * 2)),
    ]
    return found


def _taken() -> list[tuple[str, Any]]:
    return [
        ("base", json.dumps(BASE)),
        ("later_minor", edited("format", to="1.7")),
        ("indented", json.dumps(BASE, indent=2) + "\n"),
        (
            "unknown_fields",
            spliced('"later": {"anything": [1, 2.5, null, "é", "\\ud83d\\ude00", -0.0, 1e-400, 9007199254740991]}'),
        ),
        ("unknown_axis", edited(*UNET, "axes", "tile", to=[64, 64])),
        ("known_critical", edited("critical", to=["prompt-bank", "chunked-prompts"])),
        ("whole_number_as_float", edited("model", "latent", "scaling_factor", to=1)),
        ("escaped_key", json.dumps(BASE).replace('"target"', '"t\\u0061rget"')),
        ("policies", edited("policies", to=[{"name": "best-1", "file": "decoder.bin"}])),
        ("long_path", renamed("a" * 128)),
        ("path_with_spaces", renamed("my unet/a b.bin")),
        ("not_a_device", renamed("console/com10.bin")),
        ("null_golden", edited("golden", to=None)),
        ("empty_critical", edited("critical", to=[])),
        ("deep_enough", spliced('"later": ' + "[" * 100 + "]" * 100)),
        ("expanded", edited("model", "tokenizers", 0, "expand", to=[[5, 2], [9, 128]])),
    ]


def _parts(given: Any) -> list[Any]:
    """Text as it is; [text, times]; {"base64": ...} for bytes that are no text."""
    out: list[Any] = []
    for part in given if isinstance(given, list) else [given]:
        if isinstance(part, bytes):
            out.append({"base64": base64.b64encode(part).decode()})
        else:
            out.append(list(part) if isinstance(part, tuple) else part)
    return out


def whole(parts: list[Any]) -> bytes:
    """The manifest's bytes."""
    return b"".join(
        base64.b64decode(part["base64"])
        if isinstance(part, dict)
        else part.encode()
        if isinstance(part, str)
        else part[0].encode() * part[1]
        for part in parts
    )


def manifests_json(command: str) -> dict[str, Any]:
    return {
        "command": command,
        "about": "a manifest is its parts end to end: text, [text, times] or {base64}; kind: why it is refused",
        "refused": [{"name": name, "kind": kind, "parts": _parts(given)} for name, kind, given in _cases()],
        "taken": [{"name": name, "parts": _parts(given)} for name, given in _taken()],
    }
