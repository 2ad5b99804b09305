/** The few words the tests are written in: no test library, so that a bare Kotlin compiler runs them as Gradle does. */
package edgesd

import java.nio.file.Files
import java.nio.file.Path

fun ensure(good: Boolean, what: () -> String) {
    if (!good) throw AssertionError(what())
}

fun <T> equal(got: T, wanted: T, what: () -> String = { "" }) = ensure(got == wanted) { "${what()}: got $got, wanted $wanted" }

/** The error of the kind that [work] throws; fails if it throws none or another. */
inline fun <reified E : Throwable> throws(what: String, work: () -> Unit): E {
    try {
        work()
    } catch (error: Throwable) {
        if (error is E) return error
        throw AssertionError("$what: threw $error", error)
    }
    throw AssertionError("$what: nothing was thrown")
}

/** Largest difference over the largest value. */
fun relative(got: FloatArray, wanted: FloatArray): Double {
    ensure(got.size == wanted.size) { "${got.size} values, wanted ${wanted.size}" }
    val most = wanted.maxOf { kotlin.math.abs(it) }
    return got.indices.maxOf { kotlin.math.abs(got[it] - wanted[it]) } / maxOf(most, 1e-30f).toDouble()
}

/** JSON values by path: golden["runs", 3, "final"]. */
class Golden(val value: Any?) {
    operator fun get(vararg path: Any): Golden = Golden(
        path.fold(value) { at, step -> if (step is Int) (at as List<*>)[step] else (at as Map<*, *>)[step] },
    )

    fun has(key: String) = (value as Map<*, *>)[key] != null
    val list: List<Golden> get() = (value as List<*>).map(::Golden)
    val text: String get() = value as String
    val int: Int get() = (value as Long).toInt()
    val double: Double get() = (value as Number).toDouble()
    val floats: FloatArray get() = FloatArray((value as List<*>).size) { ((value as List<*>)[it] as Number).toFloat() }

    companion object {
        fun read(folder: Path, name: String) = Golden(readJson(Files.readAllBytes(folder.resolve("$name.json"))))
    }
}

/** Runs named tests, says which failed, and gives how many. */
fun runTests(tests: List<Pair<String, () -> Unit>>): Int = tests.count { (name, test) ->
    val began = System.nanoTime()
    try {
        test()
        println("ok    $name (${(System.nanoTime() - began) / 1_000_000} ms)")
        false
    } catch (error: Throwable) {
        println("FAIL  $name: ${error.message}")
        error.printStackTrace(System.out)
        true
    }
}
