/**
 * All tests: `Main GOLDEN_FOLDER [BUNDLE SERVER...]`. With a bundle, whole pictures are drawn from it too, its components run by the process
 * SERVER (android_demo/serve.py), and held against Python's.
 */
package edgesd

import java.nio.file.Paths
import kotlin.system.exitProcess

fun main(args: Array<String>) {
    val golden = Paths.get(args[0])
    val whole = if (args.size > 2) pictureTests(Paths.get(args[1]), args.drop(2)) else emptyList()
    val tests = goldenTests(golden) + bundleTests() + runtimeTests(golden) + whole
    val failed = runTests(tests)
    println("${tests.size - failed} of ${tests.size} passed")
    exitProcess(if (failed == 0) 0 else 1)
}
