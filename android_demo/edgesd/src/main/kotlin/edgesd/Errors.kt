/** The errors edgesd raises on purpose: each says what came, what is allowed and what to do. */
package edgesd

/** Base of every deliberate error. [came]: what was found; [allowed]: what would have been accepted; [todo]: what to try next. */
sealed class EdgesdError(val came: String, val allowed: String, val todo: String, cause: Throwable? = null) :
    Exception("$came. Allowed: $allowed. $todo.", cause)

/** The request cannot be met as written. */
class RequestError(came: String, allowed: String, todo: String) : EdgesdError(came, allowed, todo)

/** A file or bundle is broken, truncated, hostile or too new. */
class DataError(came: String, allowed: String, todo: String, cause: Throwable? = null) : EdgesdError(came, allowed, todo, cause)

/** This device lacks something: memory, storage, a delegate. */
class SetupError(came: String, allowed: String, todo: String) : EdgesdError(came, allowed, todo)

/** Foreign text as it may stand in a message: short, and nothing in it that steers a terminal or a text view. */
fun shown(text: Any?, limit: Int = 200): String {
    val out = StringBuilder()
    text.toString().take(limit).forEach { c ->
        val kind = Character.getType(c)
        val steers = kind == Character.CONTROL.toInt() || kind == Character.FORMAT.toInt() || kind == Character.SURROGATE.toInt()
        out.append(if (steers || c == '\u2028' || c == '\u2029') '?' else c)
    }
    return out.toString()
}

/** As C's `%g`: six significant digits, no zeros at the end. */
fun short(value: Double): String {
    if (value == Math.rint(value) && Math.abs(value) < 1e6) return value.toLong().toString()
    return java.math.BigDecimal(value).round(java.math.MathContext(6)).stripTrailingZeros().let {
        if (Math.abs(value) in 1e-4..1e6) it.toPlainString() else it.toString()
    }
}
