/** What the golden files do not hold: bundles on disk, saved runs, PNGs, policies that are refused, governed runs, broken tables. */
package edgesd

import edgesd.runtime.Call
import edgesd.runtime.Change
import edgesd.runtime.ComponentSession
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
import com.sun.net.httpserver.HttpServer
import java.io.ByteArrayOutputStream
import java.net.InetSocketAddress
import java.nio.file.Files
import java.nio.file.Path
import java.util.Base64
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream

fun runtimeTests(golden: Path): List<Pair<String, () -> Unit>> = listOf(
    "a spoiled bundle is refused, a whole one read once" to ::bundles,
    "a zip is unpacked and checked; one that leads out is refused" to ::zips,
    "a download goes on where it stopped, and is checked" to ::downloads,
    "a device without the memory is told so" to ::memory,
    "a width is switched to, its file opened and the other let go" to ::widths,
    "a saved run comes back to the bit, a spoiled one is refused" to { states(golden) },
    "broken table files are refused" to { brokenTables(golden) },
    "a PNG carries its settings; broken ones are refused" to ::pictures,
    "policies with gaps, unknown fields or rising cost are refused" to ::refusedPolicies,
    "a policy shortens, narrows once and pauses within a picture" to ::governed,
    "prepared prompts are found by their exact text" to ::banks,
    "the cache forgets what was used longest ago" to ::caches,
    "settings go to JSON and back; what this app does not draw is refused" to ::settings,
)

private inline fun inFolder(work: (Path) -> Unit) {
    val folder = Files.createTempDirectory("edgesd")
    try {
        work(folder)
    } finally {
        folder.toFile().deleteRecursively()
    }
}

private val FILES = mapOf("unet/unet.bin" to "unet", "unet/half.bin" to "half", "decoder.bin" to "decoder", "tokenizer.json" to "{}", "samplers.safetensors" to "tables")

private fun fill(folder: Path) {
    for ((path, text) in FILES) {
        Files.createDirectories(folder.resolve(path).parent)
        Files.write(folder.resolve(path), text.toByteArray())
    }
    val listed = FILES.map { (path, text) -> mapOf("path" to path, "bytes" to text.length, "sha256" to sha256(text.toByteArray())) }
    fun tensor(name: String, vararg shape: Int) = mapOf("name" to name, "dtype" to "float32", "shape" to shape.toList())
    fun part(name: String, files: Map<String, Double>, input: Any, output: Any) = mapOf(
        "name" to name,
        "variants" to files.map { (file, width) ->
            mapOf("axes" to mapOf("size_px" to listOf(16, 16), "width" to width), "files" to listOf(file), "inputs" to listOf(input), "outputs" to listOf(output))
        },
    )
    val document = mapOf(
        "format" to "1.1", "target" to "tflite",
        "model" to mapOf(
            "name" to "small", "family" to "sd1", "prediction_type" to "epsilon", "unet_in_channels" to 4,
            "latent" to mapOf("channels" to 4, "downscale" to 8, "scaling_factor" to 0.18215), "tokenizers" to emptyList<Any>(),
            "defaults" to mapOf("sampler" to "ddim", "size_px" to listOf(16, 16)),
        ),
        "components" to listOf(
            part("unet", mapOf("unet/unet.bin" to 1.0, "unet/half.bin" to 0.5), tensor("sample", 1, 4, 2, 2), tensor("model_output", 1, 4, 2, 2)),
            part("vae_decoder", mapOf("decoder.bin" to 1.0), tensor("latents", 1, 4, 2, 2), tensor("image", 1, 3, 16, 16)),
        ),
        "samplers" to listOf(mapOf("name" to "ddim", "file" to "samplers.safetensors", "steps" to listOf(1))),
        "provenance" to mapOf("source" to "tests", "sha256" to "0".repeat(64)), "files" to listed,
    )
    Files.write(folder.resolve(MANIFEST), writeJson(document).toByteArray())
}

private fun bundles() {
    val attacks = listOf<Pair<String, (Path) -> Unit>>(
        "is missing" to { Files.delete(it.resolve("decoder.bin")) },
        "bytes. Allowed: 7" to { Files.write(it.resolve("decoder.bin"), "decode".toByteArray()) },
        "does not have the sha256" to { Files.write(it.resolve("decoder.bin"), "dEcoder".toByteArray()) },
        "is in the bundle and not in its manifest" to { Files.write(it.resolve("extra.bin"), ByteArray(1)) },
        "is in the bundle and not in its manifest" to { Files.createDirectories(it.resolve("unet/deep/deeper")) },
        "is a link" to { Files.move(it.resolve("decoder.bin"), it.resolveSibling("real")); Files.createSymbolicLink(it.resolve("decoder.bin"), it.resolveSibling("real")) },
        "is a link" to { Files.createLink(it.resolveSibling("second"), it.resolve("decoder.bin")) },
        "is in the bundle" to { Files.move(it.resolve("unet"), it.resolveSibling("unet")); Files.createSymbolicLink(it.resolve("unet"), it.resolveSibling("unet")) },
        "link or no regular file" to { Files.move(it.resolve(MANIFEST), it.resolveSibling("m")); Files.createSymbolicLink(it.resolve(MANIFEST), it.resolveSibling("m")) },
        "unfinished" to { Files.delete(it.resolve(MANIFEST)) },
    )
    for ((says, attack) in attacks) inFolder { place ->
        val folder = Files.createDirectory(place.resolve("small.edgesd"))
        fill(folder)
        val receipts = place.resolve("receipts")
        ensure(readBundle(folder, receipts).hashed) { "the first read did not hash" }
        ensure(!readBundle(folder, receipts).hashed) { "the second read hashed" }
        ensure(readBundle(folder, receipts, verify = true).hashed) { "verify did not hash" }
        attack(folder)
        val error = throws<DataError>(says) { readBundle(folder, receipts) }
        ensure(says in error.message!!) { "'$says' is not in '${error.message}'" }
    }
    inFolder { place ->
        fill(place)
        Files.write(place.resolve(".DS_Store"), ByteArray(3))
        val bundle = readBundle(place)
        throws<RequestError>("an unlisted path") { bundle.path("../small") }
        equal(String(bundle.bytes("decoder.bin", 100)), "decoder")
        throws<DataError>("more bytes than allowed") { bundle.bytes("decoder.bin", 3) }
    }
}

private fun zipped(folder: Path, rename: (String) -> String = { "small.edgesd/$it" }): ByteArray {
    val out = ByteArrayOutputStream()
    ZipOutputStream(out).use { zip ->
        for (path in FILES.keys + MANIFEST) {
            zip.putNextEntry(ZipEntry(rename(path)))
            zip.write(Files.readAllBytes(folder.resolve(path)))
        }
    }
    return out.toByteArray()
}

private fun zips() = inFolder { place ->
    val whole = Files.createDirectory(place.resolve("whole"))
    fill(whole)
    equal(unpackBundle(zipped(whole).inputStream(), place.resolve("a.edgesd")).manifest.target, "tflite")
    unpackBundle(zipped(whole) { it }.inputStream(), place.resolve("b.edgesd"))
    throws<RequestError>("a name that is taken") { unpackBundle(zipped(whole).inputStream(), place.resolve("a.edgesd")) }
    val hostile = listOf<(String) -> String>({ "../$it" }, { "/tmp/$it" }, { "small.edgesd/../../$it" }, { it.replace("decoder.bin", "other.bin") })
    for (rename in hostile) throws<DataError>("a hostile name") { unpackBundle(zipped(whole, rename).inputStream(), place.resolve("c.edgesd")) }
    throws<DataError>("a cut archive") { unpackBundle(zipped(whole).copyOf(200).inputStream(), place.resolve("c.edgesd")) }
    equal(Files.list(place).use { it.count() }, 3L) { "something was left behind" }
}

/** A server of one folder that counts bytes, and breaks off each answer after [most]. */
private class Files206(val folder: Path, var most: Int) : AutoCloseable {
    var sent = 0
    private val server = HttpServer.create(InetSocketAddress("127.0.0.1", 0), 0)
    val url: String get() = "http://127.0.0.1:${server.address.port}/small.edgesd/"

    init {
        server.createContext("/small.edgesd/") { exchange ->
            val file = folder.resolve(exchange.requestURI.path.removePrefix("/small.edgesd/"))
            val from = exchange.requestHeaders.getFirst("Range")?.removePrefix("bytes=")?.removeSuffix("-")?.toInt() ?: 0
            if (Files.exists(file)) {
                val data = Files.readAllBytes(file).drop(from).toByteArray()
                exchange.sendResponseHeaders(if (from > 0) 206 else 200, data.size.toLong())
                val cut = data.copyOf(minOf(most, data.size))
                exchange.responseBody.write(cut)
                if (file.fileName.toString() != MANIFEST) sent += cut.size
            } else exchange.sendResponseHeaders(404, -1)
            exchange.close()
        }
        server.start()
    }

    override fun close() = server.stop(0)
}

private fun downloads() = inFolder { place ->
    val whole = Files.createDirectory(place.resolve("whole"))
    fill(whole)
    Files206(whole, most = Int.MAX_VALUE).use { server ->
        downloadBundle(server.url, place.resolve("a.edgesd"))
        val all = server.sent
        server.sent = 0
        // Cut within the second file: the manifest and the first are short enough to come whole.
        val stopped = place.resolve("b.edgesd")
        Files.write(Files.createDirectories(place.resolve(".b.edgesd.new/unet")).resolve("unet.bin"), "un".toByteArray())
        Files.copy(whole.resolve(MANIFEST), place.resolve(".b.edgesd.new").resolve(MANIFEST))
        var told = 0L
        downloadBundle(server.url, stopped) { done, _ -> told = done }
        equal(server.sent, all - 2) { "bytes that were there were sent again" }
        equal(told, FILES.values.sumOf { it.length.toLong() })
        val spoiled = Files.createDirectories(place.resolve(".c.edgesd.new"))
        Files.write(spoiled.resolve("decoder.bin"), "dEc".toByteArray())
        Files.copy(whole.resolve(MANIFEST), spoiled.resolve(MANIFEST))
        throws<DataError>("a first part that is another's") { downloadBundle(server.url, place.resolve("c.edgesd")) }
        downloadBundle(server.url, place.resolve("c.edgesd")) // the bad file went, so it comes whole now
        Files.delete(whole.resolve("tokenizer.json"))
        throws<DataError>("a file that is not there") { downloadBundle(server.url, place.resolve("d.edgesd")) }
        throws<RequestError>("another scheme") { downloadBundle("file:///etc", place.resolve("d.edgesd")) }
    }
    throws<SetupError>("no server") { downloadBundle("http://127.0.0.1:1/x", place.resolve("e.edgesd")) }
}

private fun memory() = inFolder { place ->
    fill(place)
    val manifest = readBundle(place).manifest
    checkMemory(manifest, 1L shl 40)
    ensure("MB are free" in throws<SetupError>("a small device") { checkMemory(manifest, 1L shl 20) }.message!!) { "the error does not say what is free" }
    val larger = manifest.copy(files = manifest.files.map { if (it.path == "unet/unet.bin") it.copy(bytes = 1L shl 30) else it })
    equal(neededBytes(larger) - neededBytes(manifest) > 2L shl 29, true) { "weights do not count" }
}

private fun widths() = inFolder { place ->
    fill(place)
    val open = ArrayList<String>()
    val session = ComponentSession(readBundle(place)) { variant, paths ->
        val name = paths[0].fileName.toString().also(open::add)
        object : Call {
            override fun run(inputs: Map<String, NdArray>) = variant.outputs.associate { it.name to Floats.of(it.shape) { name.length.toFloat() } }

            override fun close() {
                open.remove(name)
            }
        }
    }
    val sample = mapOf("sample" to Floats.of(listOf(1, 4, 2, 2)) { 0f })
    equal(session.widths("unet"), listOf(1.0, 0.5))
    session.run("unet", sample)
    equal(open, listOf("unet.bin"))
    session.useWidth("unet", 0.5)
    session.run("unet", sample)
    equal(open, listOf("half.bin"))
    throws<RequestError>("a width that is not there") { session.useWidth("unet", 0.75) }
    session.run("vae_decoder", mapOf("latents" to sample.getValue("sample")))
    equal(open, listOf("decoder.bin")) { "one component at a time" }
    throws<RequestError>("another shape") { session.run("unet", mapOf("sample" to Floats.of(listOf(2, 4, 2, 2)) { 0f })) }
    throws<RequestError>("another name") { session.run("unet", mapOf("x" to sample.getValue("sample"))) }
}

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
