/** What the app has open and what it is doing: one bundle, one work at a time, on a thread of its own. Screens read its state. */
package edgesd.app

import android.content.Context
import android.os.SystemClock
import androidx.compose.runtime.getValue
import androidx.compose.runtime.mutableStateListOf
import androidx.compose.runtime.mutableStateOf
import androidx.compose.runtime.setValue
import edgesd.Bundle
import edgesd.Finding
import edgesd.Rgb
import edgesd.checkMemory
import edgesd.deleteTree
import edgesd.downloadBundle
import edgesd.readBundle
import edgesd.runtime.Event
import edgesd.runtime.Limits
import edgesd.runtime.Picture
import edgesd.runtime.Pipeline
import edgesd.runtime.PolicyRun
import edgesd.runtime.PromptCache
import edgesd.runtime.Settings
import edgesd.runtime.pngBytes
import edgesd.runtime.preview
import edgesd.runtime.resolve
import edgesd.runtime.sample
import edgesd.selfTest
import edgesd.unpackBundle
import edgesd.writeWhole
import java.io.InputStream
import java.nio.file.Files
import java.nio.file.Path
import java.util.concurrent.CancellationException
import java.util.concurrent.Executors

/** A running work as the screens show it; share: 0..1, null = not known. */
data class Work(val what: String, val share: Float? = null, val note: String = "")

class Studio private constructor(context: Context) {
    private val root: Path = context.filesDir.toPath()
    private val bundles: Path = root.resolve("bundles")
    private val pictures: Path = root.resolve("pictures")
    private val receipts: Path = root.resolve("receipts")
    private val worker = Executors.newSingleThreadExecutor()
    private val cache = PromptCache()
    private val sensors = Sensors(context)
    private var governed: Pair<String, PolicyRun>? = null

    @Volatile private var cancelled = false

    var work by mutableStateOf<Work?>(null)
        private set
    var error by mutableStateOf<String?>(null)
        private set
    var installed by mutableStateOf(listOf<String>())
        private set
    var bundle by mutableStateOf<Bundle?>(null)
        private set
    var pipeline by mutableStateOf<Pipeline?>(null)
        private set
    var shown by mutableStateOf<Rgb?>(null)
        private set
    var picture by mutableStateOf<Picture?>(null)
        private set
    var saved by mutableStateOf<Path?>(null)
        private set
    val findings = mutableStateListOf<Finding>()

    init {
        Files.createDirectories(bundles)
        Files.createDirectories(pictures)
        list()
    }

    private fun list() {
        installed = bundles.toFile().list().orEmpty().filter { !it.startsWith(".") }.sorted()
    }

    /** Whether it was begun: one work at a time. */
    private fun start(what: String, job: () -> Unit): Boolean {
        if (work != null) return false
        cancelled = false
        error = null
        work = Work(what)
        worker.execute {
            try {
                job()
            } catch (_: CancellationException) {
                // The user's own wish: nothing to say.
            } catch (failure: OutOfMemoryError) {
                pipeline?.session?.close()
                error = "The device ran out of memory. Close other apps, or package the model smaller."
            } catch (failure: Exception) {
                error = failure.message ?: failure.toString()
            } finally {
                work = null
            }
        }
        return true
    }

    fun cancel() {
        cancelled = true
    }

    private fun checkCancelled() {
        if (cancelled) throw CancellationException()
    }

    private fun progress(what: String): (Long, Long) -> Unit = { done, total ->
        checkCancelled()
        work = Work(what, if (total > 0) done.toFloat() / total else null, "${done shr 20} MB")
    }

    fun import(name: String, stream: () -> InputStream) = start("Unpacking") {
        val place = bundles.resolve("${safe(name.removeSuffix(".zip"))}.edgesd")
        stream().use { unpackBundle(it, place, receipts, progress("Unpacking")) }
        list()
    }

    fun download(url: String) = start("Downloading") {
        val name = safe(url.trimEnd('/').substringAfterLast('/'))
        downloadBundle(url, bundles.resolve("$name.edgesd"), receipts, progress("Downloading"))
        list()
    }

    private fun safe(name: String): String = name.removeSuffix(".edgesd").filter { it.isLetterOrDigit() || it in "-_" }.take(64).ifEmpty { "model" }

    fun delete(name: String) = start("Deleting") {
        if (bundle?.folder?.fileName.toString() == name) close()
        deleteTree(bundles.resolve(name))
        list()
    }

    private fun close() {
        pipeline?.session?.close()
        pipeline = null
        bundle = null
        governed = null
    }

    /** Opens a bundle: its rules and hashes, then whether it fits the memory, before anything is loaded. */
    fun open(name: String, gpu: Boolean) = start("Checking $name") {
        close()
        val read = readBundle(bundles.resolve(name), receipts) { done, total -> progress("Checking $name")(done, total) }
        checkMemory(read.manifest, sensors.freeMemoryBytes())
        pipeline = Pipeline.open(read, openSession(read, gpu))
        bundle = read
    }

    fun defaults(prompt: String, seed: Long): Settings? = pipeline?.let { resolve(it.spec, prompt, seed) }

    /** policy: a name of the bundle's own, or null for none. done: told on the worker's thread, whatever came of it. */
    fun draw(wanted: Settings, policy: String?, done: () -> Unit) {
        val begun = start("Drawing") {
            try {
                drawNow(wanted, policy)
            } finally {
                done()
            }
        }
        if (!begun) done()
    }

    private fun drawNow(wanted: Settings, policy: String?) {
        val pipeline = pipeline ?: return
        checkMemory(checkNotNull(bundle).manifest, sensors.freeMemoryBytes())
        val governor = policy?.let { governor(pipeline, it, wanted) }
        val decision = governor?.begin()?.given
        val settings = if (decision == null) wanted else wanted.copy(steps = decision.steps, width = decision.width, guidanceUntil = decision.guidanceUntil)
        picture = null
        saved = null
        shown = null
        for (event in sample(pipeline, settings, cache, governor = governor)) {
            checkCancelled()
            when (event) {
                is Event.Stepped -> {
                    val step = event.step
                    work = Work("Drawing", (step.row + 1f) / step.table.rows, "step ${step.row + 1} of ${step.table.rows}")
                    if (pipeline.spec.latent.rgbFactors != null) shown = preview(step.denoised, pipeline.spec.latent)
                }
                is Event.Finished -> keep(pipeline, event.picture)
            }
        }
    }

    private fun governor(pipeline: Pipeline, policy: String, wanted: Settings): PolicyRun {
        governed?.takeIf { it.first == "$policy ${wanted.sampler} ${wanted.steps}" }?.let { return it.second }
        val limits = Limits(
            steps = pipeline.steps(wanted.sampler).sorted(), widths = pipeline.session.widths("unet").sorted(), maxSteps = wanted.steps,
            maxGuidanceUntil = wanted.guidanceUntil,
        )
        val run = PolicyRun(pipeline.policy(policy), sensors::read, limits, clock = { SystemClock.elapsedRealtime() / 1000.0 }, sleep = ::pause)
        governed = "$policy ${wanted.sampler} ${wanted.steps}" to run
        return run
    }

    /** A pause on heat: waited in small parts, so that cancelling ends it. */
    private fun pause(seconds: Double) {
        val before = work
        val end = SystemClock.elapsedRealtime() + (seconds * 1000).toLong()
        while (SystemClock.elapsedRealtime() < end) {
            checkCancelled()
            work = Work("Cooling down", before?.share, "${(end - SystemClock.elapsedRealtime()) / 1000 + 1} s")
            Thread.sleep(200)
        }
    }

    private fun keep(pipeline: Pipeline, made: Picture) {
        val path = pictures.resolve("${System.currentTimeMillis()}.png")
        writeWhole(path, pngBytes(made.image, made.record(pipeline)))
        shown = made.image
        picture = made
        saved = path
    }

    fun runSelfTest() = start("Self-test") {
        val bundle = bundle ?: return@start
        val pipeline = pipeline ?: return@start
        findings.clear()
        for (finding in selfTest(bundle, pipeline)) {
            checkCancelled()
            findings.add(finding)
            work = Work("Self-test", note = finding.what)
        }
    }

    /** The system is short of memory: weights load again when they are next used. */
    fun trim() {
        if (work == null) worker.execute { pipeline?.session?.close() }
    }

    companion object {
        @Volatile private var instance: Studio? = null

        fun of(context: Context): Studio = instance ?: synchronized(this) { instance ?: Studio(context.applicationContext).also { instance = it } }
    }
}
