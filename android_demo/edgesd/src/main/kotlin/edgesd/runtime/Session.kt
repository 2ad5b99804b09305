/** The protocol every runtime behind a model follows (edgesd/runtime/session.py), and the session over a bundle's variants. */
package edgesd.runtime

import edgesd.Axes
import edgesd.Bundle
import edgesd.DataError
import edgesd.EdgesdError
import edgesd.Floats
import edgesd.NdArray
import edgesd.RequestError
import edgesd.Variant
import edgesd.short
import edgesd.shown
import java.nio.file.Path

/** Runs components by name; components load on first use. The arrays that come back are the caller's own. */
interface Session : AutoCloseable {
    fun run(component: String, inputs: Map<String, NdArray>): Map<String, Floats>
    fun unload(component: String)
    fun has(component: String): Boolean

    /** Rows a call may have, ascending. */
    fun batches(component: String): List<Int>

    /** Widths the component comes in, the widest first. */
    fun widths(component: String): List<Double>

    /** What later runs compute with; the old one is let go. */
    fun useWidth(component: String, width: Double)
}

/** An opened artefact. */
interface Call : AutoCloseable {
    fun run(inputs: Map<String, NdArray>): Map<String, Floats>
}

/**
 * A [Session] over the variants of a bundle; a target only opens files. precision, form: the variant wanted, of each component that comes in
 * several. oneAtATime: opening a component lets go of the others (phones: memory).
 */
class ComponentSession(
    private val bundle: Bundle, private val precision: String? = null, private val form: String? = null, private val oneAtATime: Boolean = true,
    private val open: (Variant, List<Path>) -> Call,
) : Session {
    private val chosen = bundle.manifest.components.associate { it.name to byBatch(it.name, choose(it.name, null)) }.toMutableMap()
    private val calls = LinkedHashMap<Pair<String, Int>, List<Call>>()

    override fun has(component: String) = component in chosen

    override fun batches(component: String) = variants(component).keys.sorted()

    fun axes(component: String): Axes = variants(component).getValue(batches(component).first())[0].axes

    override fun unload(component: String) = batches(component).forEach { calls.remove(component to it)?.forEach(Call::close) }

    override fun close() {
        calls.values.flatten().forEach(Call::close)
        calls.clear()
    }

    override fun widths(component: String): List<Double> {
        val now = plain(axes(component)).copy(width = 1.0)
        return bundle.manifest.component(component).variants.filter { plain(it.axes).copy(width = 1.0) == now }.map { it.axes.width }.distinct().sortedDescending()
    }

    override fun useWidth(component: String, width: Double) {
        val have = widths(component)
        if (width !in have) throw RequestError("width ${short(width)} of $component", "this model has ${have.joinToString { short(it) }}", "Choose one of these")
        if (width == axes(component).width) return
        unload(component)
        chosen[component] = byBatch(component, choose(component, width))
    }

    override fun run(component: String, inputs: Map<String, NdArray>): Map<String, Floats> {
        val byBatch = variants(component)
        val rows = inputs.values.mapNotNull { it.shape.firstOrNull() }.filter { it in byBatch }
        val batch = rows.maxOrNull() ?: byBatch.keys.min()
        val chunks = byBatch.getValue(batch)
        val known = LinkedHashMap<String, NdArray>(inputs)
        check(component, chunks, inputs)
        for ((variant, call) in chunks.zip(opened(component, batch))) {
            val made = guarded("$component stopped while running") { call.run(variant.inputs.associate { it.name to known.getValue(it.name) }) }
            variant.outputs.forEach { known[it.name] = made[it.name] ?: throw DataError("$component gave no ${it.name}", "every output", "Package the model again") }
        }
        return chunks.last().outputs.associate { it.name to known.getValue(it.name) as Floats }
    }

    private fun variants(component: String) = chosen[component]
        ?: throw RequestError("the bundle has no component '$component'", chosen.keys.joinToString(), "Package the model with it")

    private fun opened(component: String, batch: Int): List<Call> = calls[component to batch] ?: run {
        if (oneAtATime) close()
        val made = variants(component).getValue(batch).map { variant ->
            val paths = variant.files.map(bundle::path)
            guarded("${variant.files[0]} does not load") { open(variant, paths) }
        }
        made.also { calls[component to batch] = it }
    }

    private fun <T> guarded(what: String, work: () -> T): T = try {
        work()
    } catch (error: EdgesdError) {
        throw error
    } catch (error: Exception) { // each vendor has its own kinds
        throw DataError("$what: ${shown(error.message, 300)}", "a run to the end", "Get the bundle again, or choose another variant", error)
    }

    private fun choose(component: String, width: Double?): List<Variant> {
        val own = bundle.manifest.model.defaults.sizePx
        var left = bundle.manifest.component(component).variants
        fun prefer(fits: (Axes) -> Boolean) {
            left = left.filter { fits(it.axes) }.ifEmpty { left }
        }
        if (width != null) prefer { it.width == width }
        if (precision != null) prefer { it.precision == precision }
        if (form != null) prefer { it.form == form }
        if (component == "unet" || component.startsWith("vae")) prefer { it.sizePx == own }
        val first = plain(left[0].axes)
        return left.filter { plain(it.axes) == first }
    }

    private fun plain(axes: Axes) = axes.copy(batch = 1, chunk = 0 to 1)

    private fun byBatch(component: String, variants: List<Variant>) = variants.groupBy { it.axes.batch }.mapValues { (batch, chunks) ->
        val sorted = chunks.sortedBy { it.axes.chunk.first }
        if (sorted.map { it.axes.chunk } != sorted.indices.map { it to sorted.size }) {
            throw DataError("$component for batch $batch lacks a chunk or has one twice", "each chunk once", "Package the model again")
        }
        sorted
    }

    private fun check(component: String, chunks: List<Variant>, inputs: Map<String, NdArray>) {
        val made = HashSet<String>()
        for (variant in chunks) {
            for (spec in variant.inputs.filter { it.name !in made }) {
                val given = inputs[spec.name] ?: throw RequestError("$component got no ${spec.name}", spec.name, "Pass it")
                if (given.shape != spec.shape) {
                    throw RequestError("$component got ${spec.name} of shape ${given.shape}", "${spec.shape}", "Pass that shape, or package the model for this one")
                }
            }
            made += variant.outputs.map { it.name }
        }
    }
}
