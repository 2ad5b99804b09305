/** Bundles on disk, in zips and over the network: whole ones are read, spoiled ones refused; sessions over their variants. */
package edgesd

import edgesd.runtime.Call
import edgesd.runtime.ComponentSession
import com.sun.net.httpserver.HttpServer
import java.io.ByteArrayOutputStream
import java.net.InetSocketAddress
import java.nio.file.Files
import java.nio.file.Path
import java.util.zip.ZipEntry
import java.util.zip.ZipOutputStream

fun bundleTests(): List<Pair<String, () -> Unit>> = listOf(
    "a spoiled bundle is refused, a whole one read once" to ::bundles,
    "a zip is unpacked and checked; one that leads out is refused" to ::zips,
    "a download goes on where it stopped, and is checked" to ::downloads,
    "a device without the memory is told so" to ::memory,
    "a width is switched to, its file opened and the other let go" to ::widths,
)

internal inline fun inFolder(work: (Path) -> Unit) {
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
