/** Whole pictures: this runtime around LiteRT in a Python process, against Python's own runtime around the same. */
package edgesd

import edgesd.runtime.Call
import edgesd.runtime.ComponentSession
import edgesd.runtime.Event
import edgesd.runtime.Pipeline
import edgesd.runtime.Picture
import edgesd.runtime.Settings
import edgesd.runtime.Change
import edgesd.runtime.pngBytes
import edgesd.runtime.readSettings
import edgesd.runtime.resolve
import edgesd.runtime.sample
import java.io.DataInputStream
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.file.Path

/** Frames of safetensors over a process's pipes, each behind its length. */
private class Server(command: List<String>, bundle: Path) : AutoCloseable {
    private val process = ProcessBuilder(command + bundle.toString()).redirectError(ProcessBuilder.Redirect.INHERIT).start()
    private val answers = DataInputStream(process.inputStream.buffered())

    fun ask(told: Map<String, String>, arrays: Map<String, NdArray>): Map<String, NdArray> {
        val data = writeSafetensors(arrays, told)
        val size = ByteBuffer.allocate(4).order(ByteOrder.LITTLE_ENDIAN).putInt(data.size).array()
        process.outputStream.apply {
            write(size)
            write(data)
            flush()
        }
        val answer = ByteArray(4).also(answers::readFully)
        return readSafetensors(ByteArray(ByteBuffer.wrap(answer).order(ByteOrder.LITTLE_ENDIAN).int).also(answers::readFully)).arrays
    }

    override fun close() {
        process.outputStream.close()
        process.waitFor()
    }
}

fun pictureTests(folder: Path, command: List<String>): List<Pair<String, () -> Unit>> = listOf(
    "whole pictures equal Python's within 1/255" to {
        Server(command, folder).use { server ->
            val bundle = readBundle(folder)
            val session = ComponentSession(bundle) { variant, _ ->
                object : Call {
                    override fun run(inputs: Map<String, NdArray>): Map<String, Floats> =
                        server.ask(mapOf("file" to variant.files[0]), inputs).mapValues { it.value as Floats }

                    override fun close() = Unit
                }
            }
            session.use {
                val pipeline = Pipeline.open(bundle, it)
                draw(pipeline, server)
                val findings = selfTest(bundle, pipeline).toList()
                findings.forEach { found -> println("      self-test: ${found.what} ${found.db?.let(::short) ?: found.good}") }
                ensure(findings.all { found -> found.good } && findings.size >= 6) { "the self-test found a difference" }
            }
        }
    },
)

private fun draw(pipeline: Pipeline, server: Server) {
    val plain = resolve(pipeline.spec, "a red circle above a (blue square:1.2) on a white background", seed = 3).copy(steps = 8)
    val other = pipeline.samplers.first { it != plain.sampler }
    val shorter = plain.copy(steps = 12, seed = 9, changes = listOf(Change(3, "shorten", 8, 1.0, 1.0, 0.0, "hot"), Change(4, "unguide", 8, 1.0, 0.5, 0.0, "hot")))
    val cases = listOf(plain, plain.copy(sampler = other, negativePrompt = "green", guidanceRescale = 0.5, guidanceSchedule = "linear", index = 2), shorter)
    for (settings in cases) {
        val events = sample(pipeline, settings).toList()
        val picture = (events.last() as Event.Finished).picture
        val theirs = server.ask(mapOf("draw" to writeJson(settings.toJson())), mapOf("nothing" to Floats(listOf(1), FloatArray(1))))
        val wanted = (theirs.getValue("image") as Bytes).data
        equal(picture.image.data.size, wanted.size) { "the picture's size" }
        val worst = wanted.indices.maxOf { kotlin.math.abs((wanted[it].toInt() and 255) - (picture.image.data[it].toInt() and 255)) }
        val off = relative(picture.latents.data, (theirs.getValue("latents") as Floats).data)
        println("      ${settings.sampler}, ${settings.steps} steps: at most $worst/255 off, latents $off")
        ensure(worst <= 1) { "a pixel is $worst/255 off" }
        ensure(off <= 1e-3) { "latents are $off off" }
        equal(picture.calls, (theirs.getValue("calls") as Longs).data[0].toInt()) { "UNet calls" }
        equal(Settings.fromJson(readSettings(pngBytes(picture.image, picture.record(pipeline)))["settings"]), picture.settings)
    }
    resumed(pipeline, plain)
}

/** A run left after its fourth row and gone on from the state it had there draws the same bits. */
private fun resumed(pipeline: Pipeline, settings: Settings) {
    fun picture(events: Sequence<Event>): Picture = (events.last() as Event.Finished).picture
    val state = (sample(pipeline, settings).elementAt(3) as Event.Stepped).step.state
    val whole = picture(sample(pipeline, settings))
    ensure(picture(sample(pipeline, settings, resume = state)).latents.data.contentEquals(whole.latents.data)) { "the resumed run differs" }
}
