/** A model that is ready to draw: what [sample] takes (edgesd/runtime/pipeline.py), and how it is opened from a bundle. */
package edgesd.runtime

import edgesd.Bundle
import edgesd.DataError
import edgesd.ModelSpec
import edgesd.RequestError
import edgesd.shown

/** identity: a hash of the weights, the key under which prompt embeddings may be cached. bank: prepared prompts, of a model without text encoders. */
class Pipeline(
    val spec: ModelSpec, val session: Session, val tokenizers: List<PromptTokenizer>, val identity: String, val bank: PromptBank?,
    private val tables: Map<String, Pair<TableFile, List<Int>>>, private val policies: Map<String, () -> ByteArray>,
) {
    val samplers: Set<String> get() = tables.keys
    val policyNames: Set<String> get() = policies.keys

    fun steps(sampler: String): List<Int> = file(sampler).second

    fun table(sampler: String, steps: Int): SamplerTable = file(sampler).first.table(sampler, steps)

    private fun file(sampler: String) = tables[sampler]
        ?: throw RequestError("sampler '${shown(sampler, 64)}'", tables.keys.joinToString(), "Choose one of these")

    /** A policy that came with the bundle, checked as hostile input; its own name must be the one it is listed under. */
    fun policy(name: String): Policy {
        val bytes = policies[name] ?: throw RequestError("policy '${shown(name, 60)}'", policies.keys.joinToString(), "Choose one of these")
        val policy = parsePolicy(bytes())
        if (policy.name != name) throw DataError("policy ${policy.name} is listed as $name", "one name", "Package the model again")
        return policy
    }

    companion object {
        fun open(bundle: Bundle, session: Session): Pipeline {
            val m = bundle.manifest
            val bank = m.prompts?.let { loadBank(bundle.bytes(it, MAX_BANK_BYTES)) }
            val tokenizers = if (bank != null) emptyList() else m.model.tokenizers.map { PromptTokenizer(bundle.bytes(it.file, MAX_TOKENIZER_BYTES), it) }
            if (bank == null && tokenizers.isEmpty()) throw DataError("a bundle without tokenizers or prepared prompts", "one of the two", "Package the model again")
            val files = m.samplers.map { it.file }.distinct().associateWith { TableFile(bundle.bytes(it, MAX_TABLE_BYTES)) }
            val tables = m.samplers.associate { it.name to (files.getValue(it.file) to it.steps) }
            val identity = "${m.sourceSha256}-${m.target}" // as Python names it, so that its pictures repeat here
            return Pipeline(m.model, session, tokenizers, identity, bank, tables, m.policies.associate { it.name to { bundle.bytes(it.file, MAX_POLICY_BYTES) } })
        }
    }
}
