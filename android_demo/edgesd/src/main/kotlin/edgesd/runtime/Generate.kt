/** A prompt becomes a picture: text once, then the table's rows through the UNet, then the VAE (edgesd/runtime/generate.py, stage.py). */
package edgesd.runtime

import edgesd.Floats
import edgesd.RequestError
import edgesd.Rgb

/** What [sample] yields: a step a row, then the picture. */
sealed class Event {
    class Stepped(val step: Step, val rowsRun: Int) : Event()
    class Finished(val picture: Picture) : Event()
}

/** A finished picture. calls: UNet rows computed, guidance counted twice; truncated: text that did not fit; notes: what to tell of it. */
class Picture(val image: Rgb, val latents: Floats, val settings: Settings, val calls: Int, val stepsRun: Int, val truncated: String, val notes: List<String>) {
    /** What travels in the PNG, as `edgesd generate` writes it. */
    fun record(pipeline: Pipeline): Map<String, Any?> = linkedMapOf(
        "settings" to settings.toJson(), "start" to null, "model" to pipeline.spec.name, "identity" to pipeline.identity,
        "size_px" to listOf(image.height, image.width), "calls" to calls, "steps_run" to stepsRun, "truncated" to truncated, "notes" to notes,
        "edgesd" to "android",
    )
}

/**
 * Draws one picture; the caller takes events one by one, and cancels by taking no more. resume: a `step.state` of an earlier run with the same
 * arguments: the picture equals the uninterrupted one's bits. governor: a policy, asked before every step; what it changed is in the settings.
 */
fun sample(
    pipeline: Pipeline, settings: Settings, cache: PromptCache = PromptCache(), resume: State? = null, governor: Governor? = null,
): Sequence<Event> = sequence {
    check(settings)
    if (pipeline.spec.unetInChannels != pipeline.spec.latent.channels) {
        throw RequestError("a model of ${pipeline.spec.unetInChannels} UNet channels", "models that draw from words", "Choose another bundle")
    }
    if (resume != null && (settings.earlyStop != null || governor != null || settings.changes.isNotEmpty())) {
        throw RequestError("a run to resume with early stop or a policy", "one without", "Draw the picture anew")
    }
    val asked = governor ?: if (settings.changes.isEmpty()) null else Replay(settings.changes)
    val stage = Stage(pipeline, settings, cache)
    yieldAll(stage.run(resume, asked))
    val step = stage.last ?: throw RequestError("a run without steps", "at least one", "Raise the steps")
    val final = if (step.last) step.latents else step.denoised
    val early = if (step.last) emptyList() else listOf("stopped early after row ${step.row + 1} of ${step.table.rows}")
    val drawn = settings.copy(changes = stage.changes.toList())
    val notes = stage.changes.map { it.describe() } + early
    yield(Event.Finished(Picture(decode(pipeline, final), final, drawn, stage.calls, stage.rowsRun, stage.truncated, notes)))
}

/** Finished latents [1,C,h,w] -> picture. */
fun decode(pipeline: Pipeline, latents: Floats): Rgb {
    val spec = pipeline.spec.latent
    val scale = spec.scalingFactor.toFloat()
    val shift = spec.shiftFactor.toFloat()
    return toUint8(pipeline.session.run("vae_decoder", mapOf("latents" to latents.map { it / scale + shift })).getValue("image"))
}

/** One run: its table, its plan, and its UNet with all that it is told. */
private class Stage(private val pipeline: Pipeline, private val settings: Settings, cache: PromptCache) {
    var calls = 0
    var rowsRun = 0
    var last: Step? = null
    val changes = ArrayList<Change>()
    val truncated: String
    private val source = Philox(settings.seed)
    private val shape: List<Int>
    private val cond: Map<String, Floats>
    private val uncond: Map<String, Floats>?
    private var table = pipeline.table(settings.sampler, settings.steps)
    private var until = settings.guidanceUntil
    private var narrowed: Double? = null
    private var plan = makePlan()
    private var bridges = 0L
    private var width: Double? = null

    init {
        val spec = pipeline.spec
        val (height, wide) = spec.defaults.sizePx
        val scale = spec.latent.downscale
        if (height % scale != 0 || wide % scale != 0) throw RequestError("a picture of ${wide}x$height px", "multiples of $scale", "Package the model again")
        shape = listOf(1, spec.latent.channels, height / scale, wide / scale)
        val (told, cut) = conditions(pipeline, settings, spec.defaults.sizePx, cache, negative = false)
        cond = told
        truncated = cut
        uncond = if (plan.uncond.any { it }) conditions(pipeline, settings, spec.defaults.sizePx, cache, negative = true).first else null
    }

    private fun makePlan(): RunPlan {
        val embeds = pipeline.spec.guidanceEmbeddingDim > 0
        val guidance = if (settings.guidanceScale > 1 && !embeds) settings.guidanceScale else 1.0
        return makePlan(
            settings.guidanceSchedule, table.rows, guidance, until, settings.guidanceRescale, narrowed ?: settings.width,
            if (narrowed == null) settings.switch else null, settings.earlyStop,
        )
    }

    private fun noise(row: Long, purpose: Purpose) = Floats(shape, source.normal(shape.drop(1), settings.index.toLong(), row, purpose).data)

    fun run(resume: State?, governor: Governor?): Sequence<Event> = sequence {
        if (governor != null) changes += governor.ask(0, 0)
        var entered: State? = resume
        var latents = initLatents(table, noise(0, Purpose.START))
        do {
            var before: Floats? = null
            val steps = run(table, ::denoise, latents, { noise(it + (bridges shl 16), Purpose.STEP) }, entered?.start ?: 0, entered)
            entered = null
            for (step in steps) {
                last = step
                rowsRun++
                yield(Event.Stepped(step, rowsRun))
                if (step.last) break
                if (plan.earlyStop != null) {
                    val x0 = step.denoised
                    if (before != null && plan.settled(before, x0)) break
                    before = x0
                }
                entered = if (governor == null) null else change(step, governor)
                if (entered != null) break
            }
            entered?.let { latents = it.inputs[0] }
        } while (entered != null)
    }

    /** Lets the governor have its way after [step]; where that is another table, the state to enter it with. */
    private fun change(step: Step, governor: Governor): State? {
        var entered: State? = null
        for (change in governor.ask(rowsRun, calls)) {
            val bridged = if (change.kind == "pause") null else enter(step, change.steps)
            if (change.kind == "shorten" && bridged == null && change.steps != table.steps) continue // it would save nothing
            entered = bridged ?: entered
            until = change.guidanceUntil
            if (change.kind == "narrow" || change.kind == "shorten") narrowed = change.width
            plan = makePlan()
            changes.add(change)
        }
        return entered
    }

    /** Enters the table of so many steps; null where it is the one in force, or has no fewer rows left. */
    private fun enter(step: Step, steps: Int): State? {
        if (steps == table.steps) return null
        val other = pipeline.table(settings.sampler, steps)
        val bridged = bridge(step.table, step.row, step.sample, step.modelOutput, other)
        if (other.rows - bridged.row !in 1 until step.table.rows - step.row - 1) return null
        bridges++
        table = other
        return State(bridged.row, bridged.row, listOf(bridged.inputs[0]))
    }

    /** Guidance over one or two halves, at the row's width. */
    private fun denoise(sample: Floats, row: Int): Floats {
        val wanted = plan.width[row]
        if (wanted != width) {
            pipeline.session.useWidth("unet", wanted)
            width = wanted
        }
        if (!plan.uncond[row] || uncond == null) return predict(sample, row, cond)
        val told = cond.mapValues { (name, value) -> Floats.concat(listOf(uncond.getValue(name), value)) }
        val both = predict(Floats.concat(listOf(sample, sample)), row, told)
        return combine(both.rows(0, 1), both.rows(1, 2), plan.guidance[row], plan.rescale)
    }

    /** The UNet on one or two rows, in calls of the size that the session takes. */
    private fun predict(sample: Floats, row: Int, told: Map<String, Floats>): Floats {
        val rows = sample.shape[0]
        calls += rows
        val sizes = pipeline.session.batches("unet")
        val outputs = ArrayList<Floats>()
        var done = 0
        while (done < rows) {
            val size = sizes.filter { it <= rows - done }.maxOrNull()
                ?: throw RequestError("a UNet for batches of ${sizes.joinToString()} alone", "one that takes ${rows - done} row", "Package it with batch 1")
            val inputs = told.mapValues { it.value.rows(done, done + size) } +
                mapOf("sample" to sample.rows(done, done + size), "timestep" to Floats(listOf(1), floatArrayOf(table.timestep[row])))
            outputs.add(pipeline.session.run("unet", inputs).getValue("model_output"))
            done += size
        }
        return Floats.concat(outputs)
    }
}
