/**
 * Normals that are the same on every device (edgesd/runtime/noise.py, which defines them to the bit): Philox4x32-10 keyed by what the noise is
 * for, Box-Muller in float64, rounded to float32 once.
 */
package edgesd.runtime

import edgesd.Floats
import edgesd.MAX_INT
import edgesd.NdArray
import edgesd.RequestError
import kotlin.math.PI
import kotlin.math.cos
import kotlin.math.ln
import kotlin.math.sin
import kotlin.math.sqrt

const val MAX_SEED = MAX_INT

/** What noise is for: a part of its key. Numbers are frozen. */
enum class Purpose { START, STEP, RENOISE, POSTERIOR }

fun checkSeed(seed: Long): Long {
    if (seed !in 0..MAX_SEED) throw RequestError("seed $seed", "an integer from 0 to $MAX_SEED", "Choose a seed in that range")
    return seed
}

/** Noise keyed by (seed, image, row, purpose), never by draw order: any array can be made at any time, alone. */
class Philox(seed: Long) {
    private val seed = checkSeed(seed)

    fun normal(shape: List<Int>, image: Long, row: Long, purpose: Purpose): Floats {
        val out = FloatArray(NdArray.count(shape))
        val words = LongArray(4)
        for (block in 0 until (out.size + 3) / 4) {
            philox(words, block.toLong(), image, row, purpose.ordinal.toLong())
            for (pair in 0..2 step 2) {
                val radius = sqrt(-2.0 * ln((words[pair] + 1.0) * TO_UNIT))
                val angle = 2.0 * PI * TO_UNIT * words[pair + 1]
                val at = 4 * block + pair
                if (at < out.size) out[at] = (radius * cos(angle)).toFloat()
                if (at + 1 < out.size) out[at + 1] = (radius * sin(angle)).toFloat()
            }
        }
        return Floats(shape, out)
    }

    /** Ten rounds; words below 2^32 in Longs. */
    private fun philox(words: LongArray, block: Long, image: Long, row: Long, purpose: Long) {
        var c0 = block
        var c1 = image
        var c2 = row
        var c3 = purpose
        var k0 = seed and U32
        var k1 = seed ushr 32
        repeat(10) {
            val wide0 = c0 * 0xD2511F53L // unsigned 64 bit: the sign bit is a digit, hence ushr
            val wide1 = c2 * 0xCD9E8D57L
            c0 = (wide1 ushr 32) xor c1 xor k0
            c1 = wide1 and U32
            c2 = (wide0 ushr 32) xor c3 xor k1
            c3 = wide0 and U32
            k0 = (k0 + 0x9E3779B9L) and U32
            k1 = (k1 + 0xBB67AE85L) and U32
        }
        words[0] = c0
        words[1] = c1
        words[2] = c2
        words[3] = c3
    }

    private companion object {
        const val U32 = 0xFFFFFFFFL
        const val TO_UNIT = 1.0 / 4294967296.0
    }
}
