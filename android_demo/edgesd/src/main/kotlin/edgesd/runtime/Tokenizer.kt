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
import java.text.Normalizer
import java.util.Locale
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

// ---- byte-level BPE ------------------------------------------------------------------------------------------------

/** start: where the token's text begins in the text encoded (a char index), worked out when asked. */
private class Token(val id: Long, val start: () -> Int)

private class Added(val content: String, val id: Long, val normalized: Boolean, val singleWord: Boolean)

/** White_Space of Unicode, which neither Java's nor Python's own test is. */
internal fun isSpace(c: Int): Boolean =
    c in 9..13 || c == 32 || c == 0x85 || c == 0xA0 || c == 0x1680 || c in 0x2000..0x200A || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000

private const val LETTERS = 1 shl 1 or (1 shl 2) or (1 shl 3) or (1 shl 4) or (1 shl 5)
private const val NUMBERS = 1 shl 9 or (1 shl 10) or (1 shl 11)

private class Bpe(json: Map<*, *>) {
    private val vocab = HashMap<String, Long>()
    private val ranks = HashMap<String, Int>() // "left right"
    private val suffix: String
    private val unknown: Long?
    private val added: List<Added>
    private val known = HashMap<String, List<Long>>()

    /** Ids go from 0 to size - 1. */
    val size: Long

    init {
        val model = json["model"] as? Map<*, *>
        require(model != null && model["type"] == "BPE") { "no BPE model" }
        require(model["dropout"] == null && model["byte_fallback"] != true && model["ignore_merges"] != true) { "a BPE of another kind" }
        require((model["continuing_subword_prefix"] as? String).isNullOrEmpty()) { "a BPE of another kind" }
        for ((word, id) in model["vocab"] as? Map<*, *> ?: throw IllegalArgumentException("no vocab")) {
            require(id is Long && id >= 0) { "an id that is no number" }
            vocab[word as String] = id
        }
        (model["merges"] as? List<*> ?: throw IllegalArgumentException("no merges")).forEachIndexed { rank, pair ->
            val text = if (pair is List<*> && pair.size == 2) "${pair[0]} ${pair[1]}" else pair as? String
            ranks.putIfAbsent(requireNotNull(text) { "a merge that is no pair" }, rank)
        }
        suffix = model["end_of_word_suffix"] as? String ?: ""
        unknown = vocab[model["unk_token"] as? String ?: ""]
        checkKind(json)
        added = (json["added_tokens"] as? List<*> ?: emptyList<Any?>()).map { entry ->
            require(entry is Map<*, *> && entry["lstrip"] != true && entry["rstrip"] != true) { "an added token of another kind" }
            val content = entry["content"] as? String
            val id = entry["id"] as? Long
            require(!content.isNullOrEmpty() && id != null && id >= 0) { "an added token without text or id" }
            Added(content, id, entry["normalized"] == true, entry["single_word"] == true)
        }
        val ids = vocab.values + added.map { it.id }
        size = ids.toSet().size.toLong()
    }

    /** Refuses a pipeline that is not CLIP's, which would be read wrongly in silence. */
    private fun checkKind(json: Map<*, *>) {
        val normalizers = ((json["normalizer"] as? Map<*, *>)?.get("normalizers") as? List<*>)?.map { (it as? Map<*, *>)?.get("type") }
        require(normalizers == listOf("NFC", "Replace", "Lowercase")) { "a normalizer that is not CLIP's" }
        val splits = ((json["pre_tokenizer"] as? Map<*, *>)?.get("pretokenizers") as? List<*>)?.map { it as? Map<*, *> }
        require(splits?.map { it?.get("type") } == listOf("Split", "ByteLevel") && splits[1]?.get("add_prefix_space") != true) { "a pre-tokenizer that is not CLIP's" }
        val regex = (splits[0]?.get("pattern") as? Map<*, *>)?.get("Regex")
        require(regex in PATTERNS) { "words that are not CLIP's" }
    }

    fun encode(text: String): List<Token> = split(text, added.filter { !it.normalized }).flatMap { (from, to, token) ->
        if (token != null) listOf(Token(token.id) { from }) else words(text, from, to)
    }

    /** (from, to, added token or null) over the whole text: leftmost first, the longest of those that begin there. */
    private fun split(text: String, tokens: List<Added>): List<Triple<Int, Int, Added?>> {
        val out = ArrayList<Triple<Int, Int, Added?>>()
        var plain = 0
        var at = 0
        while (at < text.length && tokens.isNotEmpty()) {
            val found = tokens.filter { text.startsWith(it.content, at) }.maxByOrNull { it.content.length }
            if (found == null) {
                at++
                continue
            }
            val to = at + found.content.length
            if (found.singleWord && (isWord(text, at - 1) || isWord(text, to))) {
                at = to
                continue
            }
            if (at > plain) out.add(Triple(plain, at, null))
            out.add(Triple(at, to, found))
            at = to
            plain = at
        }
        if (text.length > plain) out.add(Triple(plain, text.length, null))
        return out
    }

    private fun isWord(text: String, at: Int): Boolean {
        if (at !in text.indices) return false
        val c = if (text[at].isLowSurrogate() && at > 0) text.codePointBefore(at + 1) else text.codePointAt(at)
        return Character.isLetterOrDigit(c) || c == '_'.code || Character.getType(c) in listOf(6, 7, 8, 23)
    }

    private fun words(whole: String, from: Int, to: Int): List<Token> {
        val original = whole.substring(from, to)
        val composed = Normalizer.normalize(original, Normalizer.Form.NFC)
        val lower = StringBuilder()
        val origin = ArrayList<Int>() // of each char of `lower`, the index in `composed`
        var at = 0
        while (at < composed.length) {
            val c = composed.codePointAt(at)
            val low = String(Character.toChars(c)).lowercase(Locale.ROOT) // one by one: a sigma at a word's end stays a sigma
            repeat(low.length) { origin.add(at) }
            lower.append(low)
            at += Character.charCount(c)
        }
        val text = lower.toString()
        val place = { index: Int -> from + before(original, composed, origin[index]) }
        return split(text, added.filter { it.normalized }).flatMap { (start, end, token) ->
            if (token != null) listOf(Token(token.id) { place(start) }) else scan(text, start, end, place)
        }
    }

    /** The index in the original of what stands at [at] in its NFC form. */
    private fun before(original: String, composed: String, at: Int): Int {
        if (original == composed) return at
        var best = 0
        var low = 0
        var high = original.length
        while (low <= high) {
            val middle = (low + high) / 2
            val made = Normalizer.normalize(original.substring(0, middle), Normalizer.Form.NFC).length
            if (made <= at) {
                best = middle
                low = middle + 1
            } else high = middle - 1
        }
        return best
    }

    private fun kind(c: Int): Int {
        val type = 1 shl Character.getType(c)
        return if (type and LETTERS != 0) 1 else if (type and NUMBERS != 0) 2 else if (isSpace(c)) 0 else 3
    }

    /** CLIP's words: contractions, letters, single numbers, the rest; and what GPT-2's words make of a special token's text. */
    private fun scan(text: String, from: Int, to: Int, place: (Int) -> Int): List<Token> {
        val out = ArrayList<Token>()
        var at = from
        while (at < to) {
            val c = text.codePointAt(at)
            val special = SPECIAL.firstOrNull { text.startsWith(it, at) && at + it.length <= to }
            val short = CONTRACTIONS.firstOrNull { text.startsWith(it, at) && at + it.length <= to }
            val kind = kind(c)
            var end = at + Character.charCount(c)
            when {
                special != null -> {
                    end = at + special.length
                    listOf(at to at + 2, at + 2 to end - 2, end - 2 to end).forEach { (a, b) -> add(text, a, b, place, out) }
                    at = end
                    continue
                }
                short != null -> end = at + short.length
                kind == 0 -> {
                    at = end
                    continue
                }
                kind != 2 -> while (end < to && kind(text.codePointAt(end)) == kind) end += Character.charCount(text.codePointAt(end))
            }
            add(text, at, end, place, out)
            at = end
        }
        return out
    }

    private fun add(text: String, from: Int, to: Int, place: (Int) -> Int, out: MutableList<Token>) {
        val word = text.substring(from, to)
        val symbols = merged(word)
        // Where each symbol begins, in bytes of the word, becomes a character again.
        var bytes = 0
        for ((symbol, length) in symbols) {
            val begin = bytes
            val id = vocab[symbol] ?: unknown
            if (id != null) out.add(Token(id) { place(from + charAt(word, begin)) })
            bytes += length
        }
    }

    private fun charAt(word: String, byte: Int): Int {
        var at = 0
        var bytes = 0
        while (at < word.length) {
            val c = word.codePointAt(at)
            bytes += String(Character.toChars(c)).toByteArray().size
            if (bytes > byte) return at
            at += Character.charCount(c)
        }
        return at
    }

    /** (symbol, bytes it covers) after all merges, the pair of the lowest rank first. */
    private fun merged(word: String): List<Pair<String, Int>> {
        val symbols = word.toByteArray().map { BYTES[it.toInt() and 255].toString() to 1 }.toMutableList()
        symbols[symbols.size - 1] = symbols.last().let { it.first + suffix to it.second }
        while (symbols.size > 1) {
            var best = -1
            var rank = Int.MAX_VALUE
            for (i in 0 until symbols.size - 1) {
                val found = ranks["${symbols[i].first} ${symbols[i + 1].first}"] ?: continue
                if (found < rank) {
                    rank = found
                    best = i
                }
            }
            if (best < 0) break
            val (left, right) = symbols[best] to symbols[best + 1]
            symbols[best] = left.first + right.first to left.second + right.second
            symbols.removeAt(best + 1)
        }
        return symbols
    }

    private companion object {
        val SPECIAL = listOf("<|startoftext|>", "<|endoftext|>")
        val CONTRACTIONS = listOf("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")
        private const val REST = "'s|'t|'re|'ve|'m|'ll|'d|[\\p{L}]+|[\\p{N}]|[^\\s\\p{L}\\p{N}]+"

        /** As edgesd and transformers write it; older files leave out the special tokens. */
        val PATTERNS = setOf("<\\|startoftext\\|>|<\\|endoftext\\|>|$REST", REST)

        /** GPT-2's printable stand-ins for bytes. */
        val BYTES: CharArray = CharArray(256).also { letters ->
            val shown = ((33..126) + (161..172) + (174..255)).toSet()
            var next = 256
            for (byte in 0..255) letters[byte] = if (byte in shown) byte.toChar() else (next++).toChar()
        }
    }
}
