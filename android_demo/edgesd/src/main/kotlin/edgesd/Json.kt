/**
 * Strict JSON: a reader that refuses whatever readers in other languages might take differently, and a writer.
 *
 * Values are Map<String, Any?> (in order), List<Any?>, String, Long, Double, Boolean and null. Refused: a key twice, NaN and infinity (also
 * 1e999), integers beyond 2^53 - 1, lone surrogates, a byte order mark, anything that is no UTF-8, and more than 200 levels.
 */
package edgesd

import java.nio.ByteBuffer
import java.nio.charset.CharacterCodingException
import java.nio.charset.CodingErrorAction

const val MAX_INT = (1L shl 53) - 1
private const val MAX_DEPTH = 200

/** What [readJson] throws; the message says what is wrong, without the text itself. */
class JsonError(message: String) : Exception(message)

fun readJson(data: ByteArray): Any? {
    val decoder = Charsets.UTF_8.newDecoder().onMalformedInput(CodingErrorAction.REPORT)
        .onUnmappableCharacter(CodingErrorAction.REPORT)
    val text = try {
        decoder.decode(ByteBuffer.wrap(data)).toString()
    } catch (_: CharacterCodingException) {
        throw JsonError("no UTF-8")
    }
    return readJson(text)
}

fun readJson(text: String): Any? = Reader(text).document()

private class Reader(private val text: String) {
    private var at = 0

    fun document(): Any? {
        val value = value(0)
        space()
        if (at < text.length) fail("text behind the document")
        return value
    }

    private fun fail(what: String): Nothing = throw JsonError("$what at character $at")

    private fun space() {
        while (at < text.length && text[at] in " \t\r\n") at++
    }

    private fun take(c: Char) {
        if (at >= text.length || text[at] != c) fail("'$c' expected")
        at++
    }

    private fun value(depth: Int): Any? {
        if (depth > MAX_DEPTH) fail("more than $MAX_DEPTH levels")
        space()
        if (at >= text.length) fail("the end")
        return when (val c = text[at]) {
            '{' -> members(depth)
            '[' -> items(depth)
            '"' -> string()
            't' -> word("true", true)
            'f' -> word("false", false)
            'n' -> word("null", null)
            'N', 'I' -> constant()
            else -> if (c == '-' || c in '0'..'9') number() else fail("no value")
        }
    }

    private fun word(word: String, value: Any?): Any? {
        if (!text.startsWith(word, at)) fail("no value")
        at += word.length
        return value
    }

    private fun constant(): Nothing {
        val name = listOf("NaN", "Infinity").firstOrNull { text.startsWith(it, at) } ?: fail("no value")
        throw JsonError("$name is not a number that may be held")
    }

    private fun members(depth: Int): Map<String, Any?> {
        val found = LinkedHashMap<String, Any?>()
        take('{')
        space()
        if (at < text.length && text[at] == '}') return found.also { at++ }
        while (true) {
            space()
            if (at >= text.length || text[at] != '"') fail("a key expected")
            val key = string()
            space()
            take(':')
            val value = value(depth + 1)
            if (found.containsKey(key)) throw JsonError("key '${shown(key, 40)}' appears twice")
            found[key] = value
            space()
            if (at < text.length && text[at] == '}') return found.also { at++ }
            take(',')
        }
    }

    private fun items(depth: Int): List<Any?> {
        val found = ArrayList<Any?>()
        take('[')
        space()
        if (at < text.length && text[at] == ']') return found.also { at++ }
        while (true) {
            found.add(value(depth + 1))
            space()
            if (at < text.length && text[at] == ']') return found.also { at++ }
            take(',')
        }
    }

    private fun string(): String {
        take('"')
        val out = StringBuilder()
        while (true) {
            if (at >= text.length) fail("a text without end")
            val c = text[at++]
            when {
                c == '"' -> break
                c < ' ' -> fail("a control character in a text")
                c == '\\' -> out.append(escape())
                else -> out.append(c)
            }
        }
        if (!whole(out)) fail("half a surrogate pair")
        return out.toString()
    }

    private fun escape(): Char {
        if (at >= text.length) fail("a text without end")
        return when (val c = text[at++]) {
            '"', '\\', '/' -> c
            'b' -> '\b'
            'f' -> '\u000c'
            'n' -> '\n'
            'r' -> '\r'
            't' -> '\t'
            'u' -> {
                val digits = if (at + 4 <= text.length) text.substring(at, at + 4) else fail("a short escape")
                if (!digits.all { it in '0'..'9' || it in 'a'..'f' || it in 'A'..'F' }) fail("no escape")
                at += 4
                digits.toInt(16).toChar()
            }
            else -> fail("no escape")
        }
    }

    private fun digits(): Int {
        val from = at
        while (at < text.length && text[at] in '0'..'9') at++
        return at - from
    }

    private fun number(): Any {
        val from = at
        if (text[at] == '-') at++
        if (text.startsWith("Infinity", at)) constant()
        val lead = at
        if (digits() == 0) fail("no number")
        if (text[lead] == '0' && at - lead > 1) fail("a number that begins with 0")
        var whole = true
        if (at < text.length && text[at] == '.') {
            at++
            whole = false
            if (digits() == 0) fail("no number")
        }
        if (at < text.length && (text[at] == 'e' || text[at] == 'E')) {
            at++
            whole = false
            if (at < text.length && (text[at] == '+' || text[at] == '-')) at++
            if (digits() == 0) fail("no number")
        }
        if (whole) {
            val value = if (at - from > 17) null else text.substring(from, at).toLong()
            if (value == null || value > MAX_INT || value < -MAX_INT) throw JsonError("an integer beyond 2^53, which not every reader holds")
            return value
        }
        val value = text.substring(from, at).toDouble()
        if (value.isInfinite()) throw JsonError("infinity is not a number that may be held")
        return value
    }
}

/** Whether every surrogate has its other half. */
fun whole(text: CharSequence): Boolean {
    var i = 0
    while (i < text.length) {
        val c = text[i++]
        if (c.isLowSurrogate()) return false
        if (c.isHighSurrogate() && (i >= text.length || !text[i++].isLowSurrogate())) return false
    }
    return true
}

/** JSON text of the values that [readJson] gives (any Number, any Iterable); ASCII alone, as Python's json.dumps writes it. */
fun writeJson(value: Any?): String = StringBuilder().also { write(value, it) }.toString()

private fun write(value: Any?, out: StringBuilder) {
    when (value) {
        null -> out.append("null")
        is Boolean -> out.append(value)
        is Float, is Double -> {
            val number = (value as Number).toDouble()
            require(number.isFinite()) { "$number in JSON" }
            out.append(value.toString())
        }
        is Number -> out.append(value)
        is String -> quote(value, out)
        is Map<*, *> -> {
            out.append('{')
            value.entries.forEachIndexed { i, (key, item) ->
                if (i > 0) out.append(", ")
                quote(key as String, out)
                out.append(": ")
                write(item, out)
            }
            out.append('}')
        }
        is Iterable<*> -> {
            out.append('[')
            value.forEachIndexed { i, item ->
                if (i > 0) out.append(", ")
                write(item, out)
            }
            out.append(']')
        }
        else -> throw IllegalArgumentException("${value::class} in JSON")
    }
}

private fun quote(text: String, out: StringBuilder) {
    out.append('"')
    for (c in text) when {
        c == '"' || c == '\\' -> out.append('\\').append(c)
        c == '\n' -> out.append("\\n")
        c == '\r' -> out.append("\\r")
        c == '\t' -> out.append("\\t")
        c < ' ' || c > '~' -> out.append("\\u").append(c.code.toString(16).padStart(4, '0'))
        else -> out.append(c)
    }
    out.append('"')
}
