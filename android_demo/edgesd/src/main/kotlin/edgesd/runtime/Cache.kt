/** Prompt embeddings kept for the next picture, the least recently used go first (edgesd/runtime/cache.py; in memory alone). */
package edgesd.runtime

import edgesd.Floats
import edgesd.sha256
import edgesd.writeJson

const val MEMORY_BYTES = 64L shl 20

/** 64 hex digits for a text as one component of one model reads it. */
fun promptKey(model: String, component: String, text: String): String = sha256(writeJson(listOf(model, component, text)).toByteArray())

/** maxBytes: of the arrays in memory; an entry larger than that is not kept. Safe to share between threads. */
class PromptCache(private val maxBytes: Long = MEMORY_BYTES) {
    private val entries = LinkedHashMap<String, Floats>(16, 0.75f, true)
    private var held = 0L
    var hits = 0
        private set
    var misses = 0
        private set

    /** The entry of a [promptKey], computed and stored where there is none. Not to be written to. */
    @Synchronized
    fun get(key: String, compute: () -> Floats): Floats {
        entries[key]?.let {
            hits++
            return it
        }
        misses++
        val made = compute()
        entries[key] = made
        held += bytes(made)
        val oldest = entries.entries.iterator()
        while (held > maxBytes && oldest.hasNext()) {
            held -= bytes(oldest.next().value)
            oldest.remove()
        }
        return made
    }

    private fun bytes(array: Floats) = 4L * array.data.size
}
