/** safetensors files: a length, a JSON head, the arrays end to end. Read strictly, written with keys in the given order. */
package edgesd

import java.nio.ByteBuffer
import java.nio.ByteOrder

private const val MAX_HEAD = 100 shl 20
private val WIDTHS = mapOf("F32" to 4, "F16" to 2, "I64" to 8, "I32" to 4, "U8" to 1)

class Safetensors(val arrays: Map<String, NdArray>, val metadata: Map<String, String>)

/** Throws IllegalArgumentException (or a kind of it) that says what is wrong. F16 is widened, I32 and I64 are [Longs], U8 is [Bytes]. */
fun readSafetensors(data: ByteArray): Safetensors {
    require(data.size >= 8) { "no head" }
    val buffer = ByteBuffer.wrap(data).order(ByteOrder.LITTLE_ENDIAN)
    val length = buffer.getLong(0)
    require(length in 2..minOf(MAX_HEAD.toLong(), data.size - 8L)) { "a head of $length bytes" }
    val head = try {
        readJson(data.copyOfRange(8, 8 + length.toInt()).toString(Charsets.UTF_8).trimEnd(' ')) as? Map<*, *>
    } catch (error: JsonError) {
        throw IllegalArgumentException(error.message)
    }
    requireNotNull(head) { "a head that is no object" }
    val start = 8 + length.toInt()
    val ranges = ArrayList<LongRange>()
    val arrays = LinkedHashMap<String, NdArray>()
    for ((name, told) in head) {
        if (name == "__metadata__") continue
        require(told is Map<*, *>) { "an entry that is no object" }
        val width = requireNotNull(WIDTHS[told["dtype"]]) { "dtype ${shown(told["dtype"], 20)}" }
        val shape = (told["shape"] as? List<*>)?.map { (it as? Long)?.takeIf { d -> d in 0..Int.MAX_VALUE }?.toInt() }
        val ends = (told["data_offsets"] as? List<*>)?.map { it as? Long }
        require(shape != null && shape.size <= 8 && null !in shape && ends?.size == 2 && null !in ends) { "a shape or place" }
        val dims = shape.filterNotNull()
        val elements = dims.fold(1L) { total, dim -> Math.multiplyExact(total, dim.toLong()) }
        val (from, to) = ends.filterNotNull()
        require(from in 0..to && to <= data.size - start && to - from == Math.multiplyExact(elements, width.toLong())) { "a place outside the file" }
        ranges.add(from until to)
        arrays[name as String] = read(buffer, start + from.toInt(), elements.toInt(), dims, told["dtype"] as String)
    }
    var at = 0L
    for (range in ranges.filter { !it.isEmpty() }.sortedBy { it.first }) {
        require(range.first == at) { "arrays that overlap or leave holes" }
        at = range.last + 1
    }
    require(at == (data.size - start).toLong()) { "bytes that belong to no array" }
    val told = head["__metadata__"] ?: emptyMap<String, String>()
    require(told is Map<*, *> && told.values.all { it is String }) { "metadata that are no texts" }
    return Safetensors(arrays, told.entries.associate { it.key as String to it.value as String })
}

private fun read(buffer: ByteBuffer, at: Int, count: Int, shape: List<Int>, dtype: String): NdArray = when (dtype) {
    "F32" -> Floats(shape, FloatArray(count) { buffer.getFloat(at + 4 * it) })
    "F16" -> Floats(shape, FloatArray(count) { half(buffer.getShort(at + 2 * it)) })
    "I64" -> Longs(shape, LongArray(count) { buffer.getLong(at + 8 * it) })
    "I32" -> Longs(shape, LongArray(count) { buffer.getInt(at + 4 * it).toLong() })
    else -> Bytes(shape, ByteArray(count) { buffer.get(at + it) })
}

private fun half(bits: Short): Float {
    val sign = if (bits < 0) -1f else 1f
    val exponent = bits.toInt() shr 10 and 31
    val fraction = bits.toInt() and 1023
    return sign * when (exponent) {
        0 -> Math.scalb(fraction.toFloat(), -24)
        31 -> if (fraction == 0) Float.POSITIVE_INFINITY else Float.NaN
        else -> Math.scalb((1024 + fraction).toFloat(), exponent - 25)
    }
}

/** The bytes of a file; [Longs] are written as I64 (I32 for a name in [int32]). */
fun writeSafetensors(arrays: Map<String, NdArray>, metadata: Map<String, String> = emptyMap(), int32: Set<String> = emptySet()): ByteArray {
    val head = LinkedHashMap<String, Any?>()
    if (metadata.isNotEmpty()) head["__metadata__"] = metadata
    var at = 0L
    for ((name, array) in arrays) {
        val dtype = when (array) {
            is Floats -> "F32"
            is Longs -> if (name in int32) "I32" else "I64"
            is Bytes -> "U8"
        }
        val size = array.count.toLong() * WIDTHS.getValue(dtype)
        head[name] = mapOf("dtype" to dtype, "shape" to array.shape, "data_offsets" to listOf(at, at + size))
        at += size
    }
    var text = writeJson(head)
    text += " ".repeat((8 - text.length % 8) % 8)
    val out = ByteBuffer.allocate(Math.toIntExact(8 + text.length + at)).order(ByteOrder.LITTLE_ENDIAN)
    out.putLong(text.length.toLong()).put(text.toByteArray())
    for ((name, array) in arrays) when (array) {
        is Floats -> array.data.forEach { out.putFloat(it) }
        is Longs -> array.data.forEach { if (name in int32) out.putInt(it.toInt()) else out.putLong(it) }
        is Bytes -> out.put(array.data)
    }
    return out.array()
}
