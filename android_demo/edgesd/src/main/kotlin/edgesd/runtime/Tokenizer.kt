/**
 * Prompts to token ids and weights, as CLIP text encoders take them (edgesd/runtime/tokenizer.py).
 *
 * Reads a tokenizer.json of CLIP's kind: NFC, lower case, CLIP's words, byte-level BPE with "</w>". Prompt weights follow AUTOMATIC1111's web UI:
 * `(word)`, `[word]`, `(word:1.3)`; a backslash before a bracket stands for the bracket itself.
 */
package edgesd.runtime

import edgesd.DataError
import edgesd.Floats
import edgesd.JsonError
import edgesd.RequestError
import edgesd.TokenizerSpec
import edgesd.readJson
import edgesd.short
import edgesd.shown
import edgesd.whole
import kotlin.math.abs

const val MAX_PROMPT_CHARS = 20_000
const val MAX_NESTING = 32
const val MAX_WEIGHT = 10.0
const val MAX_TOKENIZER_BYTES = 64L shl 20
private val FACTOR = mapOf('(' to 1.1, '[' to 1 / 1.1)
private val OPENS = mapOf(')' to '(', ']' to '[')

/** One prompt laid out for its text encoder, a row a call. truncated: the text that did not fit. */
class Tokens(val ids: List<LongArray>, val weights: List<FloatArray>, val truncated: String = "") {
    val weighted: Boolean get() = weights.any { row -> row.any { it != 1f } }
}

/** Text with one weight. */
data class Fragment(val text: String, val weight: Double)

private class Piece(val id: Long, val weight: Float, val fragment: Int, val start: () -> Int)

class PromptTokenizer(data: ByteArray, val spec: TokenizerSpec) {
    private val bpe: Bpe

    init {
        val fix = "Get the bundle again from where it came, or package the model again"
        if (data.size > MAX_TOKENIZER_BYTES) throw DataError("a tokenizer of ${data.size} bytes", "up to $MAX_TOKENIZER_BYTES", fix)
        bpe = try {
            Bpe(readJson(data) as? Map<*, *> ?: throw IllegalArgumentException("no object"))
        } catch (error: JsonError) {
            throw DataError("${spec.file} does not load (${shown(error.message)})", "a tokenizer.json", fix)
        } catch (error: IllegalArgumentException) {
            throw DataError("${spec.file} does not load (${shown(error.message)})", "a tokenizer.json of CLIP's kind", fix)
        }
        val special = (listOf(spec.bosId, spec.eosId, spec.padId) + spec.expand.map { (first, count) -> first + count - 1 }).max()
        if (special >= bpe.size) throw DataError("token id $special", "below ${bpe.size} in ${spec.file}", fix)
    }

    /** The prompt's ids and weights in `chunks` calls of maxLength; weighted = false takes brackets as plain text. */
    fun encode(prompt: String, weighted: Boolean = true): Tokens {
        checkPrompt(prompt)
        val fragments = if (weighted) parseWeights(prompt) else listOf(Fragment(prompt, 1.0))
        val pieces = ArrayList<Piece>()
        fragments.forEachIndexed { index, (text, weight) ->
            for (token in bpe.encode(text)) {
                for (i in 0 until (spec.expand[token.id] ?: 1)) pieces.add(Piece(token.id + i, weight.toFloat(), index, token.start))
            }
        }
        val room = spec.maxLength - 2
        val calls = (0 until spec.chunks).map { layOut(pieces.subList(minOf(it * room, pieces.size), minOf((it + 1) * room, pieces.size))) }
        val cut = pieces.getOrNull(room * spec.chunks)
        val truncated = if (cut == null) "" else textFrom(fragments, cut)
        return Tokens(calls.map { it.first }, calls.map { it.second }, truncated)
    }

    private fun layOut(pieces: List<Piece>): Pair<LongArray, FloatArray> {
        val ids = LongArray(spec.maxLength) { spec.padId }
        val weights = FloatArray(spec.maxLength) { 1f }
        ids[0] = spec.bosId
        pieces.forEachIndexed { i, piece ->
            ids[i + 1] = piece.id
            weights[i + 1] = piece.weight
        }
        ids[pieces.size + 1] = spec.eosId
        return ids to weights
    }

    private fun textFrom(fragments: List<Fragment>, cut: Piece): String =
        (fragments[cut.fragment].text.substring(cut.start()) + fragments.drop(cut.fragment + 1).joinToString("") { it.text }).trim { isSpace(it.code) || it in '\u001c'..'\u001f' }
}

/** RequestError for a prompt that no tokenizer should be given: too long, or not valid text. */
fun checkPrompt(prompt: String) {
    val count = prompt.codePointCount(0, prompt.length)
    if (count > MAX_PROMPT_CHARS) throw RequestError("a prompt of $count characters", "up to $MAX_PROMPT_CHARS", "Shorten it")
    if (!whole(prompt)) throw RequestError("a prompt with broken characters", "valid Unicode text", "Type it again")
}

// ---- weights -------------------------------------------------------------------------------------------------------

/** The prompt as fragments, neighbours of equal weight joined. RequestError for brackets nested too deep or weights out of range. */
fun parseWeights(prompt: String): List<Fragment> {
    val texts = ArrayList<String>()
    val weights = ArrayList<Double>()
    val opened = ArrayList<Pair<Char, Int>>() // bracket, index of the first part inside

    fun close(bracket: Char, factor: Double): Boolean {
        val at = opened.indexOfLast { it.first == bracket }
        if (at < 0) return false
        val first = opened.removeAt(at).second
        for (i in first until weights.size) weights[i] *= factor
        return true
    }
    fun add(text: String) {
        texts.add(text)
        weights.add(1.0)
    }

    var at = 0
    while (at < prompt.length) {
        val c = prompt[at]
        val weight = if (c == ':') weightAt(prompt, at) else null
        when {
            c == '\\' -> {
                val escaped = prompt.getOrNull(at + 1)?.takeIf { it in "()[]\\" }
                add(escaped?.toString() ?: "")
                at += if (escaped == null) 1 else 2
            }
            c in FACTOR -> {
                opened.add(c to texts.size)
                if (opened.size > MAX_NESTING) {
                    throw RequestError("a prompt with brackets nested too deep", "$MAX_NESTING open at a time; \\( and \\[ for the characters", "Close them or escape them")
                }
                at++
            }
            c in OPENS -> {
                val bracket = OPENS.getValue(c)
                if (!close(bracket, FACTOR.getValue(bracket))) add(c.toString())
                at++
            }
            weight != null -> {
                if (opened.any { it.first == '(' }) close('(', number(weight.first)) else add(prompt.substring(at, weight.second))
                at = weight.second
            }
            c == ':' -> {
                add(":")
                at++
            }
            else -> {
                val from = at
                while (at < prompt.length && prompt[at] !in "\\()[]:") at++
                add(prompt.substring(from, at))
            }
        }
    }
    for ((bracket, _) in opened.toList()) close(bracket, FACTOR.getValue(bracket))
    return joined(texts, weights)
}

/** (the digits, index behind the bracket) of `: 1.3 )` at a colon, or null. */
private fun weightAt(prompt: String, colon: Int): Pair<String, Int>? {
    fun spaces(from: Int): Int {
        var i = from
        while (i < prompt.length && (isSpace(prompt[i].code) || prompt[i] in '\u001c'..'\u001f')) i++
        return i
    }
    val from = spaces(colon + 1)
    var to = from
    if (to < prompt.length && prompt[to] in "+-") to++
    val digits = to
    while (to < prompt.length && (prompt[to] == '.' || Character.isDigit(prompt[to]))) to++
    val end = spaces(to)
    return if (to > digits && end < prompt.length && prompt[end] == ')') prompt.substring(from, to) to end + 1 else null
}

private fun number(text: String): Double {
    val plain = text.map { if (Character.isDigit(it)) Character.digit(it, 10).toString() else it.toString() }.joinToString("")
    if (!Regex("[+-]?([0-9]+\\.?[0-9]*|\\.[0-9]+)").matches(plain)) {
        throw RequestError("prompt weight '${shown(text, 40)}'", "a number within +-10", "Write it like (word:1.3), or escape the brackets with a backslash")
    }
    return plain.toDouble()
}

private fun joined(texts: List<String>, weights: List<Double>): List<Fragment> {
    val out = ArrayList<Fragment>()
    val now = StringBuilder()
    for (i in texts.indices) {
        if (!(abs(weights[i]) <= MAX_WEIGHT)) throw RequestError("a prompt weight of ${short(weights[i])}", "-10 to 10", "Use a smaller weight or fewer brackets")
        now.append(texts[i])
        if (i + 1 == texts.size || weights[i + 1] != weights[i]) {
            out.add(Fragment(now.toString(), weights[i]))
            now.setLength(0)
        }
    }
    return out
}

/** Text states [1,L,D] multiplied by the tokens' weights [L], then scaled back to their former mean (AUTOMATIC1111). */
fun applyWeights(hidden: Floats, weights: FloatArray): Floats {
    val width = hidden.shape[2]
    val product = DoubleArray(hidden.data.size) { hidden.data[it].toDouble() * weights[it / width] }
    val before = hidden.data.sumOf { it.toDouble() } / product.size
    val after = product.sum() / product.size
    val scale = if (before * after > 0) before / after else 1.0
    return Floats(hidden.shape, FloatArray(product.size) { (product[it] * scale).toFloat() })
}
