/** The golden files that Python writes (tests/golden): every language must give the same. */
package edgesd

import edgesd.runtime.Limits
import edgesd.runtime.Philox
import edgesd.runtime.Previous
import edgesd.runtime.PromptTokenizer
import edgesd.runtime.Purpose
import edgesd.runtime.SamplerTable
import edgesd.runtime.State
import edgesd.runtime.Step
import edgesd.runtime.TableFile
import edgesd.runtime.DeviceState
import edgesd.runtime.addNoise
import edgesd.runtime.bridge
import edgesd.runtime.decide
import edgesd.runtime.initLatents
import edgesd.runtime.parsePolicy
import edgesd.runtime.run
import edgesd.runtime.toUint8
import java.nio.file.Path
import java.util.Base64
import kotlin.math.abs

fun goldenTests(folder: Path): List<Pair<String, () -> Unit>> = listOf(
    "noise to one ulp" to { noise(Golden.read(folder, "noise")) },
    "runs, starts, resumes and bridges of sampling.json" to { sampling(Golden.read(folder, "sampling")) },
    "12 samplers at 4 step counts" to { grid(Golden.read(folder, "grid")) },
    "token ids, weights and what does not fit" to { tokens(Golden.read(folder, "tokens")) },
    "added words, whole or anywhere" to { tokens(Golden.read(folder, "words")) },
    "what a model drew becomes bytes" to { images(Golden.read(folder, "images")) },
    "every policy decision" to { policies(Golden.read(folder, "policy")) },
    "hostile manifests are refused for their reason, sound ones taken" to { manifests(Golden.read(folder, "manifests")) },
)

private fun noise(golden: Golden) {
    for (case in golden["philox"].list) {
        val shape = case["shape"].list.map { it.int }
        val got = Philox(case["seed"].value as Long).normal(shape, case["image"].value as Long, case["row"].value as Long, Purpose.values()[case["purpose"].int])
        case["normal"].floats.forEachIndexed { i, wanted ->
            ensure(abs(got.data[i] - wanted) <= Math.ulp(wanted)) { "element $i: ${got.data[i]}, wanted $wanted" }
        }
    }
}

/** A table's run on the fixed function of tests/samplers.py and keyed noise. */
private class Case(val table: SamplerTable, golden: Golden) {
    private val shape = golden["shape"].list.map { it.int }
    private val source = Philox(golden["seed"].value as Long)
    val start = array(source.normal(shape.drop(1), 0, 0, Purpose.START).data)

    fun array(data: FloatArray) = Floats(shape, data)

    private fun model(sample: Floats, row: Int) = sample.map { value ->
        val u = value.toDouble()
        ((1.2 * u + 0.0001 * table.timestep[row].toDouble()) / (1.0 + 0.5 * u * u)).toFloat()
    }

    fun run(latents: Floats, start: Int = 0, state: State? = null): List<Step> =
        run(table, ::model, latents, { array(source.normal(shape.drop(1), 0, it.toLong(), Purpose.STEP).data) }, start, state).toList()
}

private fun close(got: FloatArray, wanted: FloatArray, what: String) = relative(got, wanted).let { ensure(it <= 1e-5) { "$what is off by $it" } }

private fun checkRun(table: SamplerTable, run: Golden, golden: Golden) {
    val case = Case(table, golden)
    val what = "${table.name}, ${table.steps} steps from row ${run["start"].int}"
    val start = run["start"].int
    val begin = if (start == 0) initLatents(table, case.start) else addNoise(table, start, case.array(golden["x0"].floats), case.start)
    close(begin.data, run["begin"].floats, "$what: the begin")
    val steps = case.run(begin, start)
    close(steps[0].denoised.data, run["first_x0"].floats, "$what: the first x0")
    close(steps.last().latents.data, run["final"].floats, "$what: the end")
    if (run.has("resume")) {
        val told = run["resume"]
        val state = State(told["row"].int, told["start"].int, told["inputs"].list.map { case.array(it.floats) }, told["outputs"].list.map { case.array(it.floats) })
        close(case.run(begin, state = state).last().latents.data, run["final"].floats, "$what: resumed")
        val own = steps[steps.size / 2].state
        ensure(case.run(begin, state = own).last().latents.data.contentEquals(steps.last().latents.data)) { "$what: an own resume differs" }
    }
}

private fun tables(golden: Golden) = TableFile(Base64.getDecoder().decode(golden["file_base64"].text))

private fun sampling(golden: Golden) {
    val file = tables(golden)
    val all = golden["tables"].list.map { file.table(it["name"].text, it["steps"].int) }
    golden["tables"].list.zip(all).forEach { (told, table) ->
        equal(table.timestep.toList(), told["timestep"].floats.toList()) { "timesteps of ${table.name}" }
        equal(table.starts.keys.map { "$it" }.toSet(), (told["starts"].value as Map<*, *>).keys) { "starts of ${table.name}" }
        for (row in 0 until table.rows) equal(table.coefficients(row).input.toList(), told["input_coef", row].floats.toList()) { "row $row of ${table.name}" }
    }
    for (run in golden["runs"].list) checkRun(all[run["table"].int], run, golden)
    for (told in golden["bridges"].list) {
        val to = all[told["to"].int]
        val case = Case(to, golden)
        val sample = case.array(told["sample"].floats)
        val state = bridge(all[told["from"].int], told["row"].int, sample, case.array(told["model_output"].floats), to)
        equal(state.row, told["entry_row"].int) { "the bridge's row" }
        close(state.inputs[0].data, told["entry"].floats, "the bridge's entry")
        val end = case.run(state.inputs[0], state = state).lastOrNull()?.latents ?: state.inputs[0]
        close(end.data, told["final"].floats, "the end behind the bridge")
    }
}

private fun grid(golden: Golden) {
    val file = tables(golden)
    val runs = golden["runs"].list
    runs.forEach { checkRun(file.table(it["sampler"].text, it["steps"].int), it, golden) }
    ensure(runs.map { it["sampler"].text to it["steps"].int }.toSet().size >= 48) { "fewer than 12 samplers at 4 step counts" }
}

private fun spec(told: Golden) = TokenizerSpec(
    "tokenizer.json", told["component"].text, told["max_length"].int, told["chunks"].int,
    told["expand"].list.associate { it[0].value as Long to it[1].int }, told["bos_id"].value as Long, told["eos_id"].value as Long, told["pad_id"].value as Long,
)

private fun tokens(golden: Golden) {
    val files = golden["tokenizers"].list.map { writeJson(it.value).toByteArray() }
    val made = golden["specs"].list.map { PromptTokenizer(files[it["tokenizer"].int], spec(it)) }
    for (case in golden["cases"].list) {
        val tokenizer = made[case["spec"].int]
        val got = tokenizer.encode(case["prompt"].text, case["weighted"].value as Boolean)
        val what = { "'${case["prompt"].text}' by spec ${case["spec"].int}" }
        val wanted = case["ids"].list.map { row -> row.list.map { it.value as Long } }
        val padded = wanted.map { row -> row + List(tokenizer.spec.maxLength - row.size) { tokenizer.spec.padId } }
        equal(got.ids.map { it.toList() }, padded, what)
        wanted.indices.forEach { call ->
            val weights = if (case.has("weights")) case["weights", call].floats else FloatArray(wanted[call].size) { 1f }
            equal(got.weights[call].toList(), weights.toList() + List(tokenizer.spec.maxLength - weights.size) { 1f }) { "weights of ${what()}" }
        }
        equal(got.truncated, if (case.has("truncated")) case["truncated"].text else "") { "what is cut off ${what()}" }
    }
    golden["refused"].list.forEach { throws<RequestError>(it["text"].text) { made[0].encode(it["text"].text.repeat(it["times"].int)) } }
    golden["accepted"].list.forEach { made[0].encode(it["text"].text.repeat(it["times"].int)) }
    throws<RequestError>("half a surrogate pair") { made[0].encode("red \ud83d") }
}

private fun images(golden: Golden) {
    val shape = listOf(1, 3, golden["picture", "height"].int, golden["picture", "width"].int)
    val drawn = Floats(shape, golden["floats"].floats).map { (1.3 * it + 0.01).toFloat() }
    equal(toUint8(drawn).data.map { it.toInt() and 255 }, golden["rounded"].list.map { it.int })
}

private fun policies(golden: Golden) {
    val tables = golden["policies"].list.map { parsePolicy(writeJson(it.value).toByteArray()) }
    val limits = golden["limits"].list.map { l ->
        Limits(
            l["steps"].list.map { it.int }, l["widths"].list.map { it.double }, l["min_steps"].int, l["max_steps"].int, l["min_width"].double, l["max_width"].double,
            l["min_guidance_until"].double, l["max_guidance_until"].double, l["tile"].value as Boolean, l["upscaler"].value as Boolean, l["refiner"].value as Boolean,
        )
    }
    for ((number, case) in golden["cases"].list.withIndex()) {
        val s = case["state"]
        fun number(key: String) = if (s.has(key)) s[key].double else null
        val state = DeviceState(
            number("battery"), s["charging"].value as Boolean?, s["saver"].value as Boolean?, if (s.has("thermal")) s["thermal"].text else "unknown",
            number("headroom"), number("free_memory_bytes"), number("deadline_s"),
            if (s.has("seconds_per_call")) mapOf(1.0 to s["seconds_per_call", "1"].double) else emptyMap(), s["time_s"].double,
        )
        val previous = if (!case.has("previous")) null else case["previous"].let { p -> Previous(p["row"].text, p["time_s"].double, (p["better_since_s"].value as Number?)?.toDouble()) }
        val d = decide(tables[case["policy"].int], state, previous, limits[case["limits"].int])
        val got = linkedMapOf(
            "steps" to d.given.steps.toLong(), "width" to d.given.width, "guidance_until" to d.given.guidanceUntil, "tile" to d.given.tile,
            "upscaler" to d.given.upscaler, "refiner" to d.given.refiner, "cool_down_s" to d.given.coolDownS, "reason" to d.reason, "row" to d.row,
            "level" to d.level.toLong(), "time_s" to d.timeS, "capped" to d.capped, "assumed" to d.assumed, "better_since_s" to d.betterSinceS,
        )
        equal(got, case["decision"].value as Map<*, *>) { "case $number" }
    }
    ensure(golden["cases"].list.size >= 500) { "fewer than 500 cases" }
}

/** What this reader's message says, by the kind of reason a case names. */
private val KINDS = mapOf(
    "size" to "bytes. Allowed: up to", "values" to "values. Allowed: up to", "json" to "does not parse", "duplicate" to "appears twice",
    "number" to "is not a number|beyond 2\\^53", "format" to "has no format|bundle format", "critical" to "features this edgesd lacks",
    "path" to "a path must", "files" to "listed twice|lists itself|not listed|bytes together", "schema" to "manifest.json: ",
)

private fun bytes(parts: Golden): ByteArray {
    val out = java.io.ByteArrayOutputStream()
    for (part in parts.list) when (val value = part.value) {
        is String -> out.write(value.toByteArray())
        is List<*> -> out.write((value[0] as String).repeat((value[1] as Long).toInt()).toByteArray())
        else -> out.write(Base64.getDecoder().decode(part["base64"].text))
    }
    return out.toByteArray()
}

private fun manifests(golden: Golden) {
    for (case in golden["refused"].list) {
        val data = bytes(case["parts"])
        val error = throws<DataError>(case["name"].text) { parseManifest(data) }
        val message = error.message!!
        ensure(Regex(KINDS.getValue(case["kind"].text)).containsMatchIn(message)) { "${case["name"].text}: $message" }
        ensure(message.length < 1000 && message.none { it < ' ' }) { "${case["name"].text}: a message that is long or steers" }
    }
    for (case in golden["taken"].list) equal(parseManifest(bytes(case["parts"])).target, "tflite") { case["name"].text }
    ensure(golden["refused"].list.size >= 30) { "fewer than 30 hostile manifests" }
}
