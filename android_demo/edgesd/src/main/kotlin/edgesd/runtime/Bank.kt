/** Prepared prompts: an app with fixed prompts ships what the text encoder made of them, and no text encoder (edgesd/runtime/bank.py). */
package edgesd.runtime

import edgesd.DataError
import edgesd.Floats
import edgesd.JsonError
import edgesd.RequestError
import edgesd.readJson
import edgesd.readSafetensors
import edgesd.shown

const val BANK_FORMAT = "edgesd-prompts-1"
const val MAX_BANK_BYTES = 1L shl 30
private const val MAX_PROMPTS = 4096

/** Prompts and their states, in order. states [N,L,D]; pooled [N,P] or null. */
class PromptBank(val prompts: List<String>, private val states: Floats, private val pooled: Floats?) {
    private val rows = prompts.withIndex().associate { it.value to it.index }

    /** The prepared states of a prompt, found by its exact text, spaces at the ends apart. */
    fun find(prompt: String): Encoded {
        val row = rows[prompt.trim()] ?: throw RequestError(
            "the prompt '${shown(prompt.trim(), 80)}' was not prepared in this bundle", prompts.filter { it.isNotEmpty() }.take(6).joinToString { "'$it'" },
            "Choose one of these, or package without --prompt-bank",
        )
        return Encoded(states.rows(row, row + 1), pooled?.rows(row, row + 1))
    }
}

/** Reads a bank. DataError for a broken one. */
fun loadBank(data: ByteArray): PromptBank {
    try {
        val file = readSafetensors(data)
        val prompts = readJson(requireNotNull(file.metadata[BANK_FORMAT]) { "no bank of prompts" }) as? List<*>
        require(prompts != null && prompts.size in 1..MAX_PROMPTS && prompts.all { it is String }) { "prompts that are none" }
        val states = file.arrays["states"] as? Floats
        val pooled = file.arrays["pooled"]
        require(states != null && states.shape.size == 3 && states.shape[0] == prompts.size && states.finite()) { "states that do not fit the prompts" }
        require(pooled == null || pooled is Floats && pooled.shape.size == 2 && pooled.shape[0] == prompts.size && pooled.finite()) { "pooled states that do not fit" }
        return PromptBank(prompts.map { it as String }, states, pooled as Floats?)
    } catch (error: IllegalArgumentException) {
        throw broken(error)
    } catch (error: JsonError) {
        throw broken(error)
    }
}

private fun broken(error: Exception) =
    DataError("the prepared prompts do not read (${shown(error.message, 120)})", "what edgesd wrote", "Package the model again")
