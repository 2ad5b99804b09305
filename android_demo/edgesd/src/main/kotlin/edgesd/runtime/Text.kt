/** What the UNet is told besides the latents: text states, the pooled text and sizes of SDXL, LCM's guidance (edgesd/runtime/text.py). */
package edgesd.runtime

import edgesd.Floats
import edgesd.Longs
import edgesd.ModelSpec
import kotlin.math.cos
import kotlin.math.exp
import kotlin.math.ln
import kotlin.math.sin

private const val POOLED = "text_encoder_2" // the component that also gives the whole prompt as one vector

/** One prompt: states [1,L,D], its weights applied; pooled [1,P] (SDXL); truncated: what did not fit. */
class Encoded(val states: Floats, val pooled: Floats? = null, val truncated: String = "")

/** The prompt through every text encoder of the model, their states side by side, or as prepared. */
fun encodePrompt(pipeline: Pipeline, prompt: String, cache: PromptCache): Encoded {
    if (pipeline.bank != null) return pipeline.bank.find(prompt)
    val towers = pipeline.tokenizers.map { tower(pipeline, it, prompt, cache) }
    val states = Floats.concat(towers.map { it.states }, axis = 2)
    return Encoded(states, towers.firstNotNullOfOrNull { it.pooled }, towers.firstOrNull { it.truncated.isNotEmpty() }?.truncated ?: "")
}

private fun tower(pipeline: Pipeline, tokenizer: PromptTokenizer, prompt: String, cache: PromptCache): Encoded {
    val tokens = tokenizer.encode(prompt)
    val component = tokenizer.spec.component
    val outputs by lazy { tokens.ids.map { pipeline.session.run(component, mapOf("input_ids" to Longs(listOf(1, it.size), it))) } }
    val hidden = cache.get(promptKey(pipeline.identity, component, prompt)) {
        Floats.concat(outputs.map { it.getValue("encoder_hidden_states") }, axis = 1)
    }
    val pooled = if (component != POOLED) null else cache.get(promptKey(pipeline.identity, "$component/pooled", prompt)) {
        outputs[0].getValue("text_embeds")
    }
    return Encoded(if (tokens.weighted) weighted(hidden, tokens) else hidden, pooled, tokens.truncated)
}

/** The weights of each call's tokens on its own states. */
private fun weighted(hidden: Floats, tokens: Tokens): Floats {
    val (_, length, width) = hidden.shape
    val each = length / tokens.weights.size
    val parts = tokens.weights.mapIndexed { i, weights ->
        applyWeights(Floats(listOf(1, each, width), hidden.data.copyOfRange(i * each * width, (i + 1) * each * width)), weights)
    }
    return Floats.concat(parts, axis = 1)
}

/** UNet input -> [1, ...], and what of the prompt did not fit. */
fun conditions(pipeline: Pipeline, settings: Settings, sizePx: Pair<Int, Int>, cache: PromptCache, negative: Boolean): Pair<Map<String, Floats>, String> {
    val spec = pipeline.spec
    val encoded = side(pipeline, settings, cache, negative)
    val told = LinkedHashMap<String, Floats>()
    told["encoder_hidden_states"] = encoded.states
    encoded.pooled?.let { told["text_embeds"] = it }
    if (spec.timeIds) told["time_ids"] = timeIds(spec, sizePx, negative)
    if (spec.guidanceEmbeddingDim > 0) told["timestep_cond"] = guidanceEmbedding(settings.guidanceScale, spec.guidanceEmbeddingDim)
    return told to encoded.truncated
}

private fun side(pipeline: Pipeline, settings: Settings, cache: PromptCache, negative: Boolean): Encoded {
    if (!negative) return encodePrompt(pipeline, settings.prompt, cache)
    if (!pipeline.spec.zeroEmptyNegative || settings.negativePrompt.isNotBlank()) return encodePrompt(pipeline, settings.negativePrompt, cache)
    val like = encodePrompt(pipeline, settings.prompt, cache)
    return Encoded(Floats.zerosLike(like.states), like.pooled?.let(Floats::zerosLike))
}

/** SDXL's size conditioning: original size, crop, then target size, or the refiner's aesthetic score. */
private fun timeIds(spec: ModelSpec, sizePx: Pair<Int, Int>, negative: Boolean): Floats {
    val size = listOf(sizePx.first.toFloat(), sizePx.second.toFloat())
    val last = if (spec.family == "sdxl_refiner") listOf(if (negative) 2.5f else 6f) else size
    val ids = size + listOf(0f, 0f) + last
    return Floats(listOf(1, ids.size), ids.toFloatArray())
}

/** Sinusoids of guidance - 1 for consistency models, [1,dim] (diffusers' get_guidance_scale_embedding). */
fun guidanceEmbedding(guidance: Double, dim: Int): Floats {
    val half = dim / 2
    val step = (-ln(10000.0) / (half - 1)).toFloat()
    val angles = FloatArray(half) { ((guidance - 1) * 1000.0).toFloat() * exp((it * step).toDouble()).toFloat() }
    return Floats.of(listOf(1, dim)) { i ->
        if (i < half) sin(angles[i].toDouble()).toFloat() else if (i < 2 * half) cos(angles[i - half].toDouble()).toFloat() else 0f
    }
}
