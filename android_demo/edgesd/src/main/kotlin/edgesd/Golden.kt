/**
 * The self-test: one recorded run of the float32 reference, repeated on this device (edgesd/golden.py, edgesd/parity.py).
 *
 * Compared in this order, so that the first difference names its cause: token ids, start noise, each component's calls, the picture.
 */
package edgesd

import edgesd.runtime.Event
import edgesd.runtime.Philox
import edgesd.runtime.Pipeline
import edgesd.runtime.Purpose
import edgesd.runtime.Settings
import edgesd.runtime.psnrDb
import edgesd.runtime.sample
import edgesd.runtime.snrDb
import kotlin.math.abs

private const val MAX_GOLDEN_BYTES = 256L shl 20

/** One line of the self-test. db: against the recorded truth, null where it is yes or no; gate: what it should reach. */
class Finding(val what: String, val good: Boolean, val db: Double?, val gate: Double?)

/** Repeats the recorded run of a bundle, a finding at a time. DataError where there are no golden vectors or they do not read. */
fun selfTest(bundle: Bundle, pipeline: Pipeline): Sequence<Finding> = sequence {
    val golden = readGolden(bundle)
    val facts = golden.facts
    for ((i, tokenizer) in pipeline.tokenizers.withIndex()) {
        val same = listOf("prompt" to facts["prompt"] as String, "negative" to facts["negative_prompt"] as String).all { (side, text) ->
            golden.longs("ids/$i/$side").contentEquals(tokenizer.encode(text).ids.flatMap { it.toList() }.toLongArray())
        }
        yield(Finding("tokens $i", same, null, null))
    }
    val noise = golden.floats("noise")
    val mine = Philox(facts["seed"] as Long).normal(noise.shape.drop(1), 0, 0, Purpose.START)
    yield(Finding("noise", noise.data.indices.all { abs(noise.data[it] - mine.data[it]) <= Math.ulp(noise.data[it]) }, null, null))
    for ((component, calls) in (facts["calls"] as List<*>).map { it as Map<*, *> }.groupBy { it["component"] as String }) {
        if (!pipeline.session.has(component)) continue
        val gate = gate(bundle, facts, component)
        val worst = calls.minOf { call ->
            val inputs = (call["inputs"] as Map<*, *>).entries.associate { it.key as String to golden.array(it.value as String) }
            val made = pipeline.session.run(component, inputs)
            (call["outputs"] as Map<*, *>).entries.minOf { (name, key) -> snrDb(golden.floats(key as String), made.getValue(name as String)) }
        }
        yield(Finding(component, gate == null || worst >= gate, worst, gate))
    }
    val settings = Settings(
        facts["prompt"] as String, facts["negative_prompt"] as String, facts["seed"] as Long, steps = (facts["steps"] as Long).toInt(),
        sampler = facts["sampler"] as String, guidanceScale = (facts["guidance"] as Number).toDouble(),
    )
    val picture = (sample(pipeline, settings).last() as Event.Finished).picture.image
    val truth = golden.array("picture") as? Bytes ?: throw golden.broken("picture")
    val stride = (facts["picture_stride"] as? Long ?: 1L).toInt()
    val small = thinned(picture, stride)
    if (small.data.size != truth.data.size) throw golden.broken("a picture of another size")
    yield(pictureFinding(bundle, facts, Rgb(small.height, small.width, truth.data), small))
}

private class GoldenFiles(val facts: Map<*, *>, private val arrays: Map<String, NdArray>) {
    fun broken(what: String) = DataError("the golden vectors do not read ($what)", "what edgesd wrote", "Package the model again")

    fun array(key: String) = arrays[key] ?: throw broken("tensor ${shown(key, 60)} is missing")

    fun floats(key: String) = array(key) as? Floats ?: throw broken("tensor ${shown(key, 60)}")

    fun longs(key: String) = (array(key) as? Longs ?: throw broken("tensor ${shown(key, 60)}")).data
}

private fun readGolden(bundle: Bundle): GoldenFiles {
    val listed = bundle.manifest.golden ?: throw DataError("the bundle has no golden vectors", "a bundle with them", "Package the model again")
    try {
        val facts = readJson(bundle.bytes(listed, MAX_GOLDEN_BYTES)) as Map<*, *>
        val f = Fields(facts, "golden")
        f.text("prompt")
        f.text("negative_prompt", "")
        f.int("seed", 0..MAX_INT)
        f.text("sampler")
        f.int("steps", 1L..1000)
        f.number("guidance")
        f.each("calls", 1, 256) { call ->
            call.text("component")
            for (side in listOf("inputs", "outputs")) call.check(call.map(side).values.all { it is String }) { "$side: texts" }
        }
        val tensors = readSafetensors(bundle.bytes(listed.removeSuffix(".json") + ".safetensors", MAX_GOLDEN_BYTES))
        return GoldenFiles(facts, tensors.arrays)
    } catch (error: JsonError) {
        throw unread(error)
    } catch (error: Wrong) {
        throw unread(error)
    } catch (error: IllegalArgumentException) {
        throw unread(error)
    } catch (error: ClassCastException) {
        throw unread(error)
    }
}

private fun unread(error: Exception) = DataError("the golden vectors do not read (${shown(error.message, 120)})", "what edgesd wrote", "Package the model again")

/** What a component must reach, in dB: its own gate, else its precision's; null where the bundle names none. */
private fun gate(bundle: Bundle, facts: Map<*, *>, component: String): Double? {
    val own = bundle.manifest.component(component).variants[0].gateDb
    return own ?: gates(bundle, facts, component)?.let { (it["snr_db"] as? Number)?.toDouble() }
}

private fun gates(bundle: Bundle, facts: Map<*, *>, component: String): Map<*, *>? =
    (facts["gates"] as? Map<*, *>)?.get(bundle.manifest.component(component).variants[0].axes.precision) as? Map<*, *>

/** The finished picture, by the gates of the UNet's precision: PSNR, mean absolute difference (0..1), or neither. */
private fun pictureFinding(bundle: Bundle, facts: Map<*, *>, truth: Rgb, made: Rgb): Finding {
    val gates = gates(bundle, facts, "unet")
    val least = (gates?.get("picture_psnr_db") as? Number)?.toDouble()
    val most = (gates?.get("picture_mean_abs") as? Number)?.toDouble()
    val mean = truth.data.indices.sumOf { abs((truth.data[it].toInt() and 255) - (made.data[it].toInt() and 255)) } / (255.0 * truth.data.size)
    val psnr = psnrDb(truth, made)
    return Finding("picture", (least == null || psnr >= least) && (most == null || mean <= most), psnr, least)
}

private fun thinned(image: Rgb, stride: Int): Rgb {
    if (stride == 1) return image
    val ys = 0 until image.height step stride
    val xs = 0 until image.width step stride
    return Rgb(ys.count(), xs.count(), ys.flatMap { y -> xs.flatMap { x -> (0..2).map { image[y, x, it].toByte() } } }.toByteArray())
}
