/** CLIP's byte-level BPE from a tokenizer.json: NFC, lower case, CLIP's words, bytes as letters, merges by rank, words ending in "</w>". */
package edgesd.runtime

import java.text.Normalizer
import java.util.Locale

/** start: where the token's text begins in the text encoded (a char index), worked out when asked. */
internal class Token(val id: Long, val start: () -> Int)

private class Added(val content: String, val id: Long, val normalized: Boolean, val singleWord: Boolean)

/** White_Space of Unicode, which neither Java's nor Python's own test is. */
internal fun isSpace(c: Int): Boolean =
    c in 9..13 || c == 32 || c == 0x85 || c == 0xA0 || c == 0x1680 || c in 0x2000..0x200A || c == 0x2028 || c == 0x2029 || c == 0x202F || c == 0x205F || c == 0x3000

private const val LETTERS = 1 shl 1 or (1 shl 2) or (1 shl 3) or (1 shl 4) or (1 shl 5)
private const val NUMBERS = 1 shl 9 or (1 shl 10) or (1 shl 11)

/** A tokenizer.json of CLIP's kind. IllegalArgumentException says why it is not one. */
internal class Bpe(json: Map<*, *>) {
    private val vocab = HashMap<String, Long>()
    private val ranks = HashMap<String, Int>() // "left right"
    private val suffix: String
    private val unknown: Long?
    private val added: List<Added>

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
            val normalized = entry["normalized"] == true
            val read = if (normalized) lowered(Normalizer.normalize(content, Normalizer.Form.NFC)).first else content
            Added(read, id, normalized, entry["single_word"] == true)
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
        // Unicode's \w: letters, marks, digits, connectors, joiners.
        return Character.isAlphabetic(c) || Character.getType(c) in listOf(6, 7, 8, 9, 23) || c in 0x200C..0x200D
    }

    private fun words(whole: String, from: Int, to: Int): List<Token> {
        val original = whole.substring(from, to)
        val composed = Normalizer.normalize(original, Normalizer.Form.NFC)
        val (text, origin) = lowered(composed)
        val place = { index: Int -> from + before(original, composed, origin[index]) }
        return split(text, added.filter { it.normalized }).flatMap { (start, end, token) ->
            if (token != null) listOf(Token(token.id) { place(start) }) else scan(text, start, end, place)
        }
    }

    /** Lower case, and of each of its chars the index in what was given. */
    private fun lowered(composed: String): Pair<String, List<Int>> {
        val lower = StringBuilder()
        val origin = ArrayList<Int>()
        var at = 0
        while (at < composed.length) {
            val c = composed.codePointAt(at)
            val low = String(Character.toChars(c)).lowercase(Locale.ROOT) // one by one: a sigma at a word's end stays a sigma
            repeat(low.length) { origin.add(at) }
            lower.append(low)
            at += Character.charCount(c)
        }
        return lower.toString() to origin
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
