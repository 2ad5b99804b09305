/** Pictures at the border: arrays to PNG and its settings, previews, comparison (edgesd/runtime/image.py). */
package edgesd.runtime

import edgesd.DataError
import edgesd.Floats
import edgesd.JsonError
import edgesd.LatentSpec
import edgesd.RequestError
import edgesd.Rgb
import edgesd.readJson
import edgesd.shown
import edgesd.writeJson
import java.io.ByteArrayOutputStream
import java.nio.ByteBuffer
import java.util.zip.CRC32
import java.util.zip.Deflater
import java.util.zip.DeflaterOutputStream
import kotlin.math.log10

const val SETTINGS_KEY = "edgesd" // the PNG text chunk that holds a picture's settings as JSON
private const val MAX_SETTINGS_CHARS = 1 shl 20
private val SIGNATURE = byteArrayOf(-119, 80, 78, 71, 13, 10, 26, 10)

/** Model output [1,3,H,W], about -1..1 -> picture. DataError if a value is not finite. */
fun toUint8(image: Floats): Rgb {
    if (!image.finite()) throw DataError("the model drew numbers that are not finite", "finite values", "Use a bundle of higher precision")
    val (_, channels, height, width) = image.shape
    val out = ByteArray(height * width * channels)
    for (c in 0 until channels) for (i in 0 until height * width) {
        val unit = (image.data[c * height * width + i] * 0.5f + 0.5f).coerceIn(0f, 1f)
        out[i * channels + c] = Math.rint((unit * 255f).toDouble()).toInt().toByte() // half to even, as numpy rounds
    }
    return Rgb(height, width, out)
}

/** Predicted latents [1,C,h,w] in the UNet's scale -> rough picture of the latents' size, linear per pixel. RequestError without rgb_factors. */
fun preview(x0: Floats, latent: LatentSpec): Rgb {
    val factors = latent.rgbFactors ?: throw RequestError("a cheap preview", "models with rgb_factors", "Decode the latents instead")
    val (_, channels, height, width) = x0.shape
    val out = ByteArray(height * width * 3)
    for (i in 0 until height * width) for (c in 0..2) {
        var sum = latent.rgbBias?.get(c) ?: 0.0
        for (k in 0 until channels) sum += factors[c][k] * x0.data[k * height * width + i]
        out[i * 3 + c] = Math.rint((if (sum.isFinite()) sum else 0.0).coerceIn(0.0, 1.0) * 255).toInt().toByte()
    }
    return Rgb(height, width, out)
}

/** Peak signal-to-noise ratio in dB; 100 for equal pictures. */
fun psnrDb(a: Rgb, b: Rgb): Double {
    require(a.data.size == b.data.size) { "pictures of two sizes" }
    val error = a.data.indices.sumOf { i -> ((a.data[i].toInt() and 255) - (b.data[i].toInt() and 255)).let { (it * it).toDouble() } } / a.data.size
    return if (error == 0.0) 100.0 else minOf(100.0, 10 * log10(255.0 * 255.0 / error))
}

/** Signal-to-noise ratio of what was made against the truth in dB, at most 200; -infinity for numbers that are not finite. */
fun snrDb(truth: Floats, made: Floats): Double {
    require(truth.shape == made.shape) { "${truth.shape} against ${made.shape}" }
    if (!made.finite()) return Double.NEGATIVE_INFINITY
    val signal = truth.data.sumOf { it.toDouble() * it }
    val noise = truth.data.indices.sumOf { i -> (truth.data[i].toDouble() - made.data[i]).let { it * it } }
    return if (noise == 0.0) 200.0 else minOf(200.0, 10 * log10(maxOf(signal, 1e-30) / noise))
}

/** The bytes of a PNG; settings go into a text chunk as JSON, where edgesd's other runtimes read them. */
fun pngBytes(image: Rgb, settings: Map<String, Any?>? = null): ByteArray {
    val out = ByteArrayOutputStream()
    out.write(SIGNATURE)
    val head = ByteBuffer.allocate(13).putInt(image.width).putInt(image.height).put(byteArrayOf(8, 2, 0, 0, 0)).array()
    chunk(out, "IHDR", head)
    if (settings != null) chunk(out, "tEXt", "$SETTINGS_KEY\u0000${writeJson(settings)}".toByteArray(Charsets.ISO_8859_1))
    val packed = ByteArrayOutputStream()
    DeflaterOutputStream(packed, Deflater(6)).use { deflated ->
        for (y in 0 until image.height) {
            deflated.write(0) // each line as it is
            deflated.write(image.data, y * image.width * 3, image.width * 3)
        }
    }
    chunk(out, "IDAT", packed.toByteArray())
    chunk(out, "IEND", ByteArray(0))
    return out.toByteArray()
}

private fun chunk(out: ByteArrayOutputStream, type: String, data: ByteArray) {
    val body = type.toByteArray(Charsets.ISO_8859_1) + data
    val crc = CRC32().also { it.update(body) }.value.toInt()
    out.write(ByteBuffer.allocate(4).putInt(data.size).array())
    out.write(body)
    out.write(ByteBuffer.allocate(4).putInt(crc).array())
}

/** The settings that [pngBytes] (or Python) put into a picture, its checksums verified. DataError for what is broken or not edgesd's. */
fun readSettings(png: ByteArray): Map<String, Any?> {
    val fix = "Give a PNG that edgesd made, as it was written"
    var text: String? = null
    for ((type, data) in chunks(png)) {
        if (type != "tEXt") continue
        val zero = data.indexOf(0)
        if (zero > 0 && String(data, 0, zero, Charsets.ISO_8859_1) == SETTINGS_KEY) text = String(data, zero + 1, data.size - zero - 1, Charsets.ISO_8859_1)
    }
    if (text == null || text.length > MAX_SETTINGS_CHARS) throw DataError("the picture carries no settings of edgesd", "a PNG with them", fix)
    val found = try {
        readJson(text)
    } catch (_: JsonError) {
        null
    }
    @Suppress("UNCHECKED_CAST")
    return found as? Map<String, Any?> ?: throw DataError("the settings in the picture do not parse", "a JSON object", fix)
}

private fun chunks(png: ByteArray): Sequence<Pair<String, ByteArray>> = sequence {
    fun broken(what: String) = DataError("the picture is broken (${shown(what)})", "a whole PNG", "Give another file")
    if (png.size < 8 || !png.copyOf(8).contentEquals(SIGNATURE)) throw broken("no PNG")
    val buffer = ByteBuffer.wrap(png)
    var at = 8
    while (true) {
        if (at + 12 > png.size) throw broken("it ends too early")
        val size = buffer.getInt(at)
        if (size < 0 || size > png.size - at - 12) throw broken("a chunk beyond its end")
        val crc = CRC32().also { it.update(png, at + 4, size + 4) }.value.toInt()
        if (crc != buffer.getInt(at + 8 + size)) throw broken("a checksum")
        val type = String(png, at + 4, 4, Charsets.ISO_8859_1)
        yield(type to png.copyOfRange(at + 8, at + 8 + size))
        if (type == "IEND") return@sequence
        at += 12 + size
    }
}
