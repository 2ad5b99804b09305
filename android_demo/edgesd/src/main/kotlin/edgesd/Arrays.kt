/** Arrays with a shape, in C order: all that the runtime computes with. */
package edgesd

sealed class NdArray {
    abstract val shape: List<Int>
    val count: Int get() = count(shape)

    companion object {
        fun count(shape: List<Int>): Int = shape.fold(1) { total, dim -> Math.multiplyExact(total, dim) }
    }
}

class Floats(override val shape: List<Int>, val data: FloatArray) : NdArray() {
    init { require(count(shape) == data.size) { "$shape for ${data.size} values" } }

    inline fun map(change: (Float) -> Float) = Floats(shape, FloatArray(data.size) { change(data[it]) })

    inline fun with(other: Floats, change: (Float, Float) -> Float): Floats {
        require(shape == other.shape) { "$shape with ${other.shape}" }
        return Floats(shape, FloatArray(data.size) { change(data[it], other.data[it]) })
    }

    /** Rows [from, to) of the first axis. */
    fun rows(from: Int, to: Int): Floats {
        val each = if (shape[0] == 0) 0 else data.size / shape[0]
        return Floats(listOf(to - from) + shape.drop(1), data.copyOfRange(from * each, to * each))
    }

    fun finite(): Boolean = data.all { it.isFinite() }

    companion object {
        fun of(shape: List<Int>, make: (Int) -> Float) = Floats(shape, FloatArray(count(shape), make))

        fun zerosLike(other: Floats) = Floats(other.shape, FloatArray(other.data.size))

        /** Joined along [axis]; the other axes must be alike. */
        fun concat(parts: List<Floats>, axis: Int = 0): Floats {
            if (parts.size == 1) return parts[0]
            val first = parts[0].shape
            val shape = first.toMutableList().also { s -> s[axis] = parts.sumOf { it.shape[axis] } }
            parts.forEach { part -> require(part.shape.indices.all { it == axis || part.shape[it] == first[it] }) { "shapes differ" } }
            val outer = count(first.take(axis))
            val out = FloatArray(count(shape))
            var at = 0
            for (block in 0 until outer) for (part in parts) {
                val size = part.data.size / outer
                part.data.copyInto(out, at, block * size, (block + 1) * size)
                at += size
            }
            return Floats(shape, out)
        }
    }
}

class Longs(override val shape: List<Int>, val data: LongArray) : NdArray()

class Bytes(override val shape: List<Int>, val data: ByteArray) : NdArray()

/** A picture [height, width, 3], one byte a channel. */
class Rgb(val height: Int, val width: Int, val data: ByteArray) {
    init { require(data.size == height * width * 3) { "${data.size} bytes for ${width}x$height" } }

    operator fun get(y: Int, x: Int, channel: Int): Int = data[(y * width + x) * 3 + channel].toInt() and 255
}
