/** What the golden files do not hold: saved runs, PNGs, policies that are refused, governed runs, broken tables. */
package edgesd

import edgesd.runtime.Change
import edgesd.runtime.Outcome
import edgesd.runtime.Philox
import edgesd.runtime.PolicyRun
import edgesd.runtime.DeviceState
import edgesd.runtime.Limits
import edgesd.runtime.PromptCache
import edgesd.runtime.Purpose
import edgesd.runtime.Settings
import edgesd.runtime.State
import edgesd.runtime.TableFile
import edgesd.runtime.fitting
import edgesd.runtime.loadBank
import edgesd.runtime.parsePolicy
import edgesd.runtime.pngBytes
import edgesd.runtime.readSettings
import edgesd.runtime.readState
import edgesd.runtime.saveState
import edgesd.runtime.toUint8
import java.nio.file.Files
import java.nio.file.Path
import java.util.Base64

fun runtimeTests(golden: Path): List<Pair<String, () -> Unit>> = listOf(
    "a saved run comes back to the bit, a spoiled one is refused" to { states(golden) },
    "broken table files are refused" to { brokenTables(golden) },
    "a PNG carries its settings; broken ones are refused" to ::pictures,
    "policies with gaps, unknown fields or rising cost are refused" to ::refusedPolicies,
    "a policy shortens, narrows once and pauses within a picture" to ::governed,
    "prepared prompts are found by their exact text" to ::banks,
    "the cache forgets what was used longest ago" to ::caches,
    "settings go to JSON and back; what this app does not draw is refused" to ::settings,
)

private fun tables(golden: Path) = Base64.getDecoder().decode(Golden.read(golden, "grid")["file_base64"].text)

private fun states(golden: Path) = inFolder { folder ->
    val table = TableFile(tables(golden)).table("dpmpp_2m_karras", 7)
    val shape = listOf(1, 2, 3, 4)
    fun array(row: Long) = Floats(shape, Philox(5).normal(shape, 0, row, Purpose.STEP).data)
    val state = State(3, 0, (0 until table.inputs).map { array(it.toLong()) }, (0 until table.outputs - 1).map { array(9L + it) })
    val path = folder.resolve("run.state")
    saveState(path, table, state, "me", "{}", array(20) to array(21))
    val saved = readState(path)
    val back = fitting(saved, table, "me")
    ensure(back.inputs.zip(state.inputs).all { (a, b) -> a.data.contentEquals(b.data) } && back.row == 3) { "another state came back" }
    equal(saved.told, "{}")
    throws<RequestError>("another owner") { fitting(saved, table, "you") }
    throws<RequestError>("another table") { fitting(saved, TableFile(tables(golden)).table("ddim", 7), "me") }
    val short = State(3, 0, state.inputs.take(1), state.outputs)
    saveState(path, table, short, "me")
    throws<DataError>("too few inputs") { fitting(readState(path), table, "me") }
    val data = Files.readAllBytes(path)
    for (cut in listOf(0, 7, 40, data.size - 1)) {
        Files.write(path, data.copyOf(cut))
        throws<DataError>("cut to $cut bytes") { readState(path) }
    }
}

private fun brokenTables(golden: Path) {
    val data = tables(golden)
    TableFile(data)
    throws<DataError>("nothing") { TableFile(ByteArray(0)) }
    throws<DataError>("a cut file") { TableFile(data.copyOf(data.size - 4)) }
    throws<DataError>("a head beyond the end") { TableFile(data.clone().also { it[5] = 127 }) }
    val file = readSafetensors(data)
    fun spoiled(change: (MutableMap<String, NdArray>) -> Unit) = writeSafetensors(file.arrays.toMutableMap().also(change), file.metadata, file.arrays.keys.filter { it.endsWith("/steps") || it.endsWith("/rows") }.toSet())
    TableFile(spoiled { })
    throws<DataError>("alpha 0") { TableFile(spoiled { it["ddim/alpha"] = Floats.zerosLike(it["ddim/alpha"] as Floats) }) }
    throws<DataError>("NaN") { TableFile(spoiled { it["ddim/sigma"] = (it["ddim/sigma"] as Floats).map { Float.NaN } }) }
    throws<DataError>("a missing array") { TableFile(spoiled { it.remove("heun/draws") }) }
    throws<DataError>("more warm-up rows than the run has") { TableFile(spoiled { arrays -> arrays["pndm/warm_rows"] = (arrays["pndm/warm_rows"] as Bytes).let { b -> Bytes(b.shape, ByteArray(b.data.size) { 200.toByte() }) } }) }
}

private fun pictures() {
    val image = Floats.of(listOf(1, 3, 2, 2)) { it / 6f - 1 }
    val made = toUint8(image)
    equal(made[0, 0, 0], 0)
    equal(made[0, 1, 0], 21) // (1/6 * 0.5) * 255 = 21.25
    throws<DataError>("not finite") { toUint8(image.map { Float.NaN }) }
    val told = mapOf("settings" to mapOf("prompt" to "é \"x\"\n\u0000", "seed" to MAX_INT), "later" to listOf(1.5, null, true))
    val png = pngBytes(made, told)
    equal(writeJson(readSettings(png)), writeJson(told))
    val decoded = javax.imageio.ImageIO.read(png.inputStream())
    equal(decoded.getRGB(1, 0) and 255, made[0, 1, 2])
    throws<DataError>("no settings") { readSettings(pngBytes(made)) }
    throws<DataError>("a flipped bit") { readSettings(png.clone().also { it[60] = (it[60] + 1).toByte() }) }
    throws<DataError>("a cut file") { readSettings(png.copyOf(png.size - 5)) }
    throws<DataError>("no PNG") { readSettings("GIF89a...".toByteArray()) }
}

private fun rowJson(name: String, level: Int, whenever: String, then: String) = """{"name":"$name","level":$level,"when":{$whenever},"then":{$then},"reason":"x"}"""

private fun table(vararg rows: String) = """{"name":"p","about":"x","dwell_s":30,"rows":[${rows.joinToString()}]}""".toByteArray()

private fun refusedPolicies() {
    val well = rowJson("well", 0, "", "\"steps\":20")
    val low = rowJson("low", 1, "\"battery\":[0,0.2]", "\"steps\":10")
    equal(parsePolicy(table(low, well)).rows.size, 2)
    val cases = mapOf(
        "a gap" to table(low), "never reached" to table(well, low), "one name" to table(low, low, well),
        "is not known" to table(rowJson("low", 1, "\"moon\":[0,1]", "\"steps\":10"), well), "costs" to table(rowJson("low", 1, "\"battery\":[0,0.2]", "\"steps\":30"), well),
        "different things" to table(rowJson("low", 0, "\"battery\":[0,0.2]", "\"steps\":10"), well), "never falls" to table(rowJson("high", 1, "\"battery\":[0.5,null]", "\"steps\":10"), well),
        "raises a part" to table(rowJson("low", 1, "\"battery\":[0,0.2]", "\"steps\":10,\"upscaler\":true"), well), "is empty" to table(rowJson("low", 1, "\"battery\":[0.3,0.2]", "\"steps\":10"), well),
        "no JSON" to "{".toByteArray(), "must be an integer" to table(rowJson("well", 0, "", "\"steps\":20.0")), "must be from" to table(rowJson("well", 0, "", "\"steps\":0")),
    )
    for ((says, data) in cases) throws<DataError>(says) { parsePolicy(data) }.let { ensure(says in it.message!!) { "'$says' is not in '${it.message}'" } }
}

private fun governed() {
    val policy = parsePolicy(
        table(
            rowJson("hot", 2, "\"thermal\":[\"serious\",\"critical\"]", "\"steps\":8,\"width\":0.5,\"cool_down_s\":7"),
            rowJson("warm", 1, "\"thermal\":[\"fair\"]", "\"steps\":12,\"width\":0.75"), rowJson("well", 0, "", "\"steps\":20"),
        ),
    )
    var thermal = "nominal"
    var slept = 0.0
    val run = PolicyRun(policy, { DeviceState(thermal = thermal) }, Limits(widths = listOf(0.5, 0.75, 1.0)), clock = { 0.0 }, sleep = { slept += it })
    equal(run.begin().given, Outcome(20))
    equal(run.ask(1, 2), emptyList())
    thermal = "fair"
    equal(run.ask(2, 4).map { it.kind to it.steps }, listOf("narrow" to 12, "shorten" to 12))
    thermal = "serious"
    val changes = run.ask(3, 6)
    equal(changes.map { it.kind }, listOf("shorten", "pause"))
    equal(changes[0].width, 0.75) { "width falls once" }
    equal(slept, 7.0)
    equal(run.ask(4, 8), emptyList()) { "a row in force pauses once" }
    equal(Change.fromJson(readJson(writeJson(changes[0].toJson()))), changes[0])
    throws<DataError>("a change of another kind") { Change.fromJson(changes[0].toJson() + ("kind" to "dance")) }
}

private fun banks() {
    val states = Floats.of(listOf(2, 3, 4)) { it.toFloat() }
    val bank = loadBank(writeSafetensors(mapOf("states" to states), mapOf("edgesd-prompts-1" to writeJson(listOf("a red circle", "")))))
    equal(bank.find(" a red circle ").states.data.toList(), states.data.take(12))
    ensure("a red circle" in throws<RequestError>("another prompt") { bank.find("a blue circle") }.message!!) { "the error does not say which there are" }
    throws<DataError>("too few states") { loadBank(writeSafetensors(mapOf("states" to states), mapOf("edgesd-prompts-1" to "[\"a\"]"))) }
}

private fun caches() {
    val cache = PromptCache(maxBytes = 80)
    fun ask(key: String) = cache.get(key) { Floats(listOf(8), FloatArray(8)) }
    ask("a")
    ask("b")
    ask("a")
    ask("c") // 96 bytes: b goes
    equal(cache.misses, 3)
    ask("a")
    equal(cache.hits, 2)
    ask("b")
    equal(cache.misses, 4)
}

private fun settings() {
    val s = Settings("x", seed = 7, guidanceScale = 4.0, width = 0.5, switch = 0.3 to 1.0, changes = listOf(Change(2, "shorten", 8, 1.0, 1.0, 0.0, "hot")))
    equal(Settings.fromJson(readJson(writeJson(s.toJson()))), s)
    throws<DataError>("an unknown key") { Settings.fromJson(s.toJson() + ("later" to 1L)) }
    throws<DataError>("a seed as text") { Settings.fromJson(mapOf("prompt" to "x", "seed" to "7")) }
    throws<RequestError>("torch's noise") { Settings.fromJson(mapOf("prompt" to "x", "rng" to "torch")) }
    throws<RequestError>("a start image") { Settings.fromJson(mapOf("prompt" to "x", "strength" to 0.5)) }
}
