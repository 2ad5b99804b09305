/** What decides a picture: one frozen record, checked, that travels in the PNG (edgesd/runtime/settings.py). */
package edgesd.runtime

import edgesd.DataError
import edgesd.ModelSpec
import edgesd.RequestError
import edgesd.short

const val MAX_IMAGES = 1000

/**
 * See edgesd/runtime/settings.py for each. This app draws from words: strength is 1, rng is philox, there is no refiner; a PNG that says otherwise
 * is refused by name, never drawn differently.
 */
data class Settings(
    val prompt: String, val negativePrompt: String = "", val seed: Long = 0, val index: Int = 0, val steps: Int = 20, val sampler: String = "dpmpp_2m_karras",
    val guidanceScale: Double = 7.5, val guidanceSchedule: String = "constant", val guidanceUntil: Double = 1.0, val guidanceRescale: Double = 0.0,
    val earlyStop: Double? = null, val width: Double = 1.0, val switch: Pair<Double, Double>? = null, val changes: List<Change> = emptyList(),
) {
    /** With every field that Python writes, so that `edgesd generate --from` reads it. */
    fun toJson(): Map<String, Any?> = linkedMapOf(
        "prompt" to prompt, "negative_prompt" to negativePrompt, "seed" to seed, "index" to index, "num_inference_steps" to steps, "sampler" to sampler,
        "guidance_scale" to guidanceScale, "guidance_schedule" to guidanceSchedule, "guidance_until" to guidanceUntil, "guidance_rescale" to guidanceRescale,
        "early_stop" to earlyStop, "strength" to 1.0, "rng" to "philox", "original_size" to null, "crops_coords_top_left" to listOf(0, 0),
        "target_size" to null, "aesthetic_score" to 6.0, "negative_aesthetic_score" to 2.5, "refiner_start" to null, "width" to width,
        "switch" to switch?.toList(), "changes" to changes.map { it.toJson() },
    )

    companion object {
        private val KNOWN = Settings("x").toJson()

        /** Settings as a PNG carries them. DataError for unknown keys and wrong types, RequestError for what this app does not draw. */
        fun fromJson(data: Any?): Settings {
            val map = data as? Map<*, *>
            if (map == null || map["prompt"] !is String || map.keys.any { it !in KNOWN }) throw unread()
            for (key in listOf("strength", "rng", "refiner_start", "original_size", "target_size", "crops_coords_top_left")) {
                val value = map[key]
                val usual = KNOWN[key]
                val same = key !in map || value == usual || value is Number && usual is Number && value.toDouble() == usual.toDouble() ||
                    value is List<*> && usual is List<*> && value.map { (it as? Number)?.toInt() } == usual
                if (!same) throw RequestError("a picture with $key $value", "pictures from words alone", "Draw it with edgesd generate --from")
            }
            fun <T> get(key: String, fallback: T, read: (Any) -> T?): T = if (key !in map) fallback else map[key]?.let(read) ?: throw unread()
            fun number(key: String, fallback: Double) = get(key, fallback) { (it as? Number)?.toDouble() }
            fun whole(key: String, fallback: Long) = get(key, fallback) { it as? Long }
            fun text(key: String, fallback: String) = get(key, fallback) { it as? String }
            val switch = (map["switch"] as? List<*>)?.map { (it as? Number)?.toDouble() ?: throw unread() }
            if (switch != null && switch.size != 2) throw unread()
            return Settings(
                text("prompt", ""), text("negative_prompt", ""), whole("seed", 0), whole("index", 0).toInt(), whole("num_inference_steps", 20).toInt(),
                text("sampler", "dpmpp_2m_karras"), number("guidance_scale", 7.5), text("guidance_schedule", "constant"), number("guidance_until", 1.0),
                number("guidance_rescale", 0.0), if (map["early_stop"] == null) null else number("early_stop", 0.0), number("width", 1.0),
                switch?.let { it[0] to it[1] }, get("changes", emptyList()) { (it as? List<*>)?.take(4097)?.map(Change::fromJson) },
            ).also { if (it.changes.size > 4096) throw unread() }
        }

        private fun unread() = DataError("the picture's settings do not parse", "what edgesd writes", "Set them by hand")
    }
}

/** The model's own defaults for a prompt. */
fun resolve(spec: ModelSpec, prompt: String, seed: Long = 0): Settings =
    check(Settings(prompt, seed = seed, steps = spec.defaults.steps, sampler = spec.defaults.sampler, guidanceScale = spec.defaults.guidance))

/** The settings, or a RequestError that names the one that cannot be. */
fun check(s: Settings): Settings {
    fun rule(good: Boolean, came: String, allowed: String, todo: String) {
        if (!good) throw RequestError(came, allowed, todo)
    }
    rule(s.prompt.isNotBlank(), "an empty prompt", "at least one word", "Say what to draw")
    rule(s.steps in 1..1000, "${s.steps} steps", "1 to 1000", "Change the steps")
    rule(s.guidanceScale in 0.0..100.0, "guidance ${s.guidanceScale}", "0 to 100", "Change it")
    rule(s.guidanceUntil in 0.0..1.0, "guidance until ${s.guidanceUntil}", "0 to 1", "Change it")
    rule(s.guidanceRescale in 0.0..1.0, "guidance rescale ${s.guidanceRescale}", "0 to 1", "Change it")
    rule(s.guidanceSchedule in SCHEDULES, "schedule '${s.guidanceSchedule}'", SCHEDULES.keys.joinToString(), "Choose one")
    rule(s.earlyStop == null || s.earlyStop > 0 && s.earlyStop < 1, "early stop ${s.earlyStop}", "above 0, below 1", "Change it")
    rule(s.index in 0 until MAX_IMAGES, "picture ${s.index}", "0 to ${MAX_IMAGES - 1}", "Change it")
    rule(s.width > 0 && s.width <= 1, "width ${short(s.width)}", "above 0, at most 1", "Change it")
    rule(s.switch == null || s.switch.first in 0.0..1.0 && s.switch.second > 0 && s.switch.second <= 1, "switch ${s.switch}", "a share of the run and a width", "Change it")
    checkSeed(s.seed)
    return s
}
