/**
 * The bundle's schema: frozen data read from `manifest.json`, with the rules of docs/bundle.md (edgesd/manifest.py).
 *
 * A reader refuses a newer major version and any name in `critical` that it does not know, and ignores fields it does not know.
 */
package edgesd

const val FORMAT_MAJOR = 1
val KNOWN_CRITICAL = setOf("chunked-prompts", "expanded-tokens", "prompt-bank")
const val MAX_MANIFEST_BYTES = 16 shl 20
const val MAX_VALUES = 1 shl 18
const val MAX_BUNDLE_BYTES = 1L shl 36
private const val MAX_DIM = 1L shl 24
private const val MAX_ELEMENTS = 1L shl 31
private const val AGAIN = "Get the bundle again from where it came, or package the model again"
private val ROLES = setOf("text_encoder", "text_encoder_2", "unet", "vae_decoder", "vae_encoder")
private val NAME = Regex("[A-Za-z0-9_][A-Za-z0-9_.+-]{0,127}")
private val POLICY_NAME = Regex("[a-z0-9][a-z0-9_-]{0,39}")
private val PART = Regex("[A-Za-z0-9_][A-Za-z0-9._ -]{0,127}")
private val DEVICE = Regex("(con|prn|aux|nul|com[0-9]|lpt[0-9])(\\..*)?", setOf(RegexOption.IGNORE_CASE, RegexOption.DOT_MATCHES_ALL))
private val SHA256 = Regex("[0-9a-f]{64}")

/** One input or output of a component; shape is static. */
data class TensorSpec(val name: String, val dtype: String, val shape: List<Int>)

data class FileEntry(val path: String, val bytes: Long, val sha256: String)

/** What one variant is made for. width: fraction of the inner channels that stay; form: a target's flavour ("", "gpu", …). */
data class Axes(
    val width: Double, val sizePx: Pair<Int, Int>, val batch: Int, val precision: String, val chunk: Pair<Int, Int>, val form: String,
)

/** One artefact of a component; files[0] is what a runtime opens. */
data class Variant(
    val axes: Axes, val files: List<String>, val inputs: List<TensorSpec>, val outputs: List<TensorSpec>,
    val params: Long, val macs: Long, val status: String, val snrDb: Double?, val gateDb: Double?, val plan: String?,
)

data class Component(val name: String, val variants: List<Variant>)

/** One tokenizer.json and the layout its text encoder wants; see edgesd/manifest.py. expand: (id, count). */
data class TokenizerSpec(
    val file: String, val component: String, val maxLength: Int, val chunks: Int, val expand: Map<Long, Int>,
    val bosId: Long, val eosId: Long, val padId: Long,
)

/** Decoder input = latents / scalingFactor + shiftFactor; rgbFactors: rows R, G, B of a linear preview. */
data class LatentSpec(
    val channels: Int, val downscale: Int, val scalingFactor: Double, val shiftFactor: Double,
    val rgbFactors: List<List<Double>>?, val rgbBias: List<Double>?,
)

data class Defaults(val sampler: String, val steps: Int, val guidance: Double, val sizePx: Pair<Int, Int>)

data class ModelSpec(
    val name: String, val family: String, val predictionType: String, val unetInChannels: Int, val latent: LatentSpec,
    val tokenizers: List<TokenizerSpec>, val defaults: Defaults, val zeroEmptyNegative: Boolean, val guidanceEmbeddingDim: Int,
    val timeIds: Boolean,
)

/** Tables of one sampler inside a safetensors file: the step counts it holds. */
data class SamplerFile(val name: String, val file: String, val steps: List<Int>)

data class PolicyFile(val name: String, val file: String)

/** A bundle. quality: what validation measured, as JSON values. */
data class Manifest(
    val format: String, val critical: List<String>, val target: String, val model: ModelSpec, val components: List<Component>,
    val samplers: List<SamplerFile>, val policies: List<PolicyFile>, val golden: String?, val prompts: String?,
    val quality: Map<String, Any?>, val licence: String, val source: String, val sourceSha256: String,
    val files: List<FileEntry>,
) {
    fun component(name: String): Component = components.firstOrNull { it.name == name }
        ?: throw DataError("the bundle has no component '$name'", components.joinToString { it.name }, "Package it again with that component")
}

/** Parses and checks manifest bytes. Throws DataError for anything malformed, hostile or too new. */
fun parseManifest(data: ByteArray): Manifest {
    if (data.size > MAX_MANIFEST_BYTES) throw DataError("manifest.json has ${data.size} bytes", "up to $MAX_MANIFEST_BYTES", AGAIN)
    val values = data.count { it == ','.code.toByte() }
    if (values > MAX_VALUES) throw DataError("manifest.json has more than $values values", "up to $MAX_VALUES", AGAIN)
    val raw = try {
        readJson(data)
    } catch (error: JsonError) {
        throw DataError("manifest.json does not parse (${shown(error.message)})", "strict UTF-8 JSON", AGAIN)
    }
    val format = (raw as? Map<*, *>)?.get("format") as? String
        ?: throw DataError("manifest.json has no format", "an object with format $FORMAT_MAJOR.x", AGAIN)
    checkFormat(format, if (raw.containsKey("critical")) raw["critical"] else emptyList<String>())
    try {
        return manifest(Fields(raw, "")).also(::checkClosed)
    } catch (error: Wrong) {
        throw DataError("manifest.json: ${shown(error.message)}", "what docs/bundle.md describes", AGAIN)
    }
}

private fun checkFormat(version: String, critical: Any?) {
    val matched = Regex("([0-9]{1,4})\\.([0-9]{1,4})").matchEntire(version)
    if (matched == null || matched.groupValues[1].toInt() != FORMAT_MAJOR) {
        throw DataError("bundle format '${shown(version, 40)}'", "$FORMAT_MAJOR.x", "Install the app that reads it, or package again")
    }
    val listed = critical as? List<*> ?: listOf(critical)
    val unknown = listed.filter { it !in KNOWN_CRITICAL }.map { it as? String ?: "(not a name)" }
    // A known name alone, in place of a list, is a mistake of the schema: told below.
    if (unknown.isNotEmpty()) {
        val names = shown(unknown.take(8).joinToString())
        throw DataError("the bundle needs features this edgesd lacks: $names", KNOWN_CRITICAL.sorted().joinToString(), "Update the app")
    }
}

/** A plain relative POSIX path: no `..`, no drive or device, no backslash, no control character, no hidden part. */
internal fun isRelativePath(path: String): Boolean = path.length in 1..512 && path.split("/").all { part ->
    PART.matches(part) && !DEVICE.matches(part) && !part.endsWith(".") && !part.endsWith(" ")
}

// ---- reading fields ------------------------------------------------------------------------------------------------

/** What is wrong, and where: becomes a DataError. */
internal class Wrong(message: String) : Exception(message)

/** An object's fields, each read with the type and range it must have; [Wrong] says which is not. */
internal class Fields(private val raw: Map<*, *>, private val where: String) {
    private fun at(key: String) = if (where.isEmpty()) key else "$where.$key"

    private fun wrong(key: String, what: String): Nothing = throw Wrong("${at(key)}: $what")

    /** The value, or null where the key is left out; an explicit null counts only where [nullable]. */
    private fun value(key: String, nullable: Boolean = false): Any? {
        if (!raw.containsKey(key)) return null
        return raw[key] ?: if (nullable) null else wrong(key, "must not be null")
    }

    fun has(key: String) = raw.containsKey(key)

    fun text(key: String, default: String? = null, max: Int = 4096, pattern: Regex? = null): String {
        val found = value(key) ?: return default ?: wrong(key, "is missing")
        return checkedText(key, found, max, pattern)
    }

    private fun checkedText(key: String, found: Any?, max: Int, pattern: Regex?): String {
        if (found !is String) wrong(key, "must be a text")
        if (found.codePointCount(0, found.length) > max) wrong(key, "must have at most $max characters")
        if (pattern != null && !pattern.matches(found)) wrong(key, "must match ${pattern.pattern}")
        return found
    }

    fun oneOf(key: String, allowed: Set<String>, default: String? = null): String =
        text(key, default).also { if (it !in allowed) wrong(key, "must be one of ${allowed.joinToString()}") }

    fun path(key: String): String = checkedPath(key, value(key) ?: wrong(key, "is missing"))

    fun optionalPath(key: String): String? = value(key, nullable = true)?.let { checkedPath(key, it) }

    fun paths(key: String, max: Int): List<String> = list(key, 1, max).map { checkedPath(key, it) }

    private fun checkedPath(key: String, found: Any?): String {
        val path = checkedText(key, found, Int.MAX_VALUE, null)
        if (!isRelativePath(path)) {
            wrong(key, "a path must be relative, of letters, digits, '.', '_', '-', stay inside the bundle, and be no device of Windows")
        }
        return path
    }

    fun int(key: String, range: LongRange, default: Long? = null): Long = checkedInt(key, value(key) ?: default ?: wrong(key, "is missing"), range)

    private fun checkedInt(key: String, found: Any?, range: LongRange): Long {
        if (found !is Long) wrong(key, "must be an integer")
        if (found !in range) wrong(key, "must be from ${range.first} to ${range.last}")
        return found
    }

    fun ints(key: String, range: LongRange, min: Int, max: Int): List<Int> = list(key, min, max).map { checkedInt(key, it, range).toInt() }

    fun pair(key: String, first: LongRange, second: LongRange, default: Pair<Int, Int>? = null): Pair<Int, Int> {
        if (default != null && !has(key)) return default
        val (a, b) = list(key, 2, 2)
        return checkedInt(key, a, first).toInt() to checkedInt(key, b, second).toInt()
    }

    fun number(key: String, default: Double? = null): Double = checkedNumber(key, value(key) ?: default ?: wrong(key, "is missing"))

    fun optionalNumber(key: String): Double? = value(key, nullable = true)?.let { checkedNumber(key, it) }

    fun checkedNumber(key: String, found: Any?): Double {
        if (found !is Long && found !is Double) wrong(key, "must be a number")
        return (found as Number).toDouble()
    }

    fun flag(key: String): Boolean = when (val found = value(key) ?: false) {
        is Boolean -> found
        else -> wrong(key, "must be true or false")
    }

    fun list(key: String, min: Int, max: Int, nullable: Boolean = false): List<Any?> {
        val found = value(key, nullable) ?: if (min == 0) emptyList<Any?>() else wrong(key, "is missing")
        if (found !is List<*>) wrong(key, "must be a list")
        if (found.size !in min..max) wrong(key, "must have $min to $max items")
        return found
    }

    fun map(key: String): Map<String, Any?> {
        val found = value(key) ?: emptyMap<String, Any?>()
        @Suppress("UNCHECKED_CAST")
        return found as? Map<String, Any?> ?: wrong(key, "must be an object")
    }

    fun fields(key: String): Fields = Fields(value(key) as? Map<*, *> ?: wrong(key, "must be an object"), at(key))

    fun <T> each(key: String, min: Int, max: Int, read: (Fields) -> T): List<T> = list(key, min, max).mapIndexed { i, item ->
        read(Fields(item as? Map<*, *> ?: wrong("$key.$i", "must be an object"), at("$key.$i")))
    }

    fun names(key: String, max: Int): List<String> = list(key, 0, max).map { checkedText(key, it, 128, NAME) }

    fun check(good: Boolean, what: () -> String) {
        if (!good) throw Wrong(if (where.isEmpty()) what() else "$where: ${what()}")
    }
}

private fun manifest(f: Fields): Manifest {
    f.text("format", pattern = Regex("[0-9]{1,4}\\.[0-9]{1,4}"))
    if (f.has("noise")) checkNoise(f.fields("noise"))
    val provenance = f.fields("provenance")
    provenance.text("sha256", pattern = SHA256)
    for ((name, version) in provenance.map("libraries")) f.check(version is String) { "provenance.libraries.$name: must be a text" }
    provenance.map("recipe")
    f.list("downgrades", 0, 4096)
    return Manifest(
        format = f.text("format"), critical = f.names("critical", 64), target = f.text("target", pattern = NAME), model = model(f.fields("model")),
        components = f.each("components", 1, 16, ::component),
        samplers = f.each("samplers", 1, 64) { SamplerFile(it.text("name", pattern = NAME), it.path("file"), it.ints("steps", 1L..1000, 1, 1000)) },
        policies = f.each("policies", 0, 64) { PolicyFile(it.text("name", pattern = POLICY_NAME), it.path("file")) },
        golden = f.optionalPath("golden"), prompts = f.optionalPath("prompts"), quality = f.map("quality"),
        licence = provenance.text("licence", "unknown"), source = provenance.text("source"),
        sourceSha256 = provenance.text("sha256"),
        files = f.each("files", 1, 65536) { FileEntry(it.path("path"), it.int("bytes", 0..MAX_INT), it.text("sha256", pattern = SHA256)) },
    )
}

private fun checkNoise(f: Fields) {
    f.oneOf("generator", setOf("philox4x32-10"), "philox4x32-10")
    f.oneOf("transform", setOf("box-muller-f64"), "box-muller-f64")
    f.int("version", 1L..1, 1) // other noise is another picture: nothing to ignore
}

private fun model(f: Fields): ModelSpec {
    val d = f.fields("defaults")
    f.int("clip_skip", 0L..64, 0)
    return ModelSpec(
        name = f.text("name", pattern = NAME), family = f.text("family", max = 32),
        predictionType = f.oneOf("prediction_type", setOf("epsilon", "v_prediction", "sample", "flow", "edm")),
        unetInChannels = f.int("unet_in_channels", 1L..64).toInt(), latent = latent(f.fields("latent")),
        tokenizers = if (f.has("tokenizers")) f.each("tokenizers", 0, 4, ::tokenizer) else throw Wrong("model.tokenizers: is missing"),
        defaults = Defaults(
            d.text("sampler", pattern = NAME), d.int("steps", 1L..1000, 20).toInt(), d.number("guidance", 7.5), d.pair("size_px", 1..MAX_DIM, 1..MAX_DIM),
        ),
        zeroEmptyNegative = f.flag("zero_empty_negative"), guidanceEmbeddingDim = f.int("guidance_embedding_dim", 0L..65536, 0).toInt(),
        timeIds = f.flag("time_ids"),
    )
}

private fun latent(f: Fields): LatentSpec {
    val factors = f.list("rgb_factors", 0, 3, nullable = true).takeIf { f.has("rgb_factors") && it.isNotEmpty() }?.map { row ->
        f.check(row is List<*> && row.size <= 64) { "rgb_factors: rows of numbers" }
        (row as List<*>).map { f.checkedNumber("rgb_factors", it) }
    }
    val bias = f.list("rgb_bias", 0, 3, nullable = true).takeIf { f.has("rgb_bias") && it.isNotEmpty() }?.map { f.checkedNumber("rgb_bias", it) }
    f.check(bias == null || bias.size == 3) { "rgb_bias: must have 3 items" }
    return LatentSpec(
        f.int("channels", 1L..64).toInt(), f.int("downscale", 1L..64).toInt(), f.number("scaling_factor"), f.number("shift_factor", 0.0), factors, bias,
    )
}

private fun tokenizer(f: Fields): TokenizerSpec {
    val expand = f.list("expand", 0, 1024).map { pair ->
        val (id, count) = (pair as? List<*>)?.takeIf { it.size == 2 } ?: throw Wrong("expand: pairs of id and count")
        f.check(id is Long && id in 0..MAX_INT && count is Long && count in 2..128) { "expand: an id and a count of 2 to 128" }
        (id as Long) to (count as Long).toInt()
    }
    return TokenizerSpec(
        f.path("file"), f.oneOf("component", ROLES), f.int("max_length", 3L..4096).toInt(), f.int("chunks", 1L..16, 1).toInt(), expand.toMap(),
        f.int("bos_id", 0..MAX_INT), f.int("eos_id", 0..MAX_INT), f.int("pad_id", 0..MAX_INT),
    )
}

private fun component(f: Fields) = Component(f.oneOf("name", ROLES), f.each("variants", 1, 256, ::variant))

private fun variant(f: Fields): Variant {
    val axes = f.fields("axes")
    val width = axes.number("width", 1.0)
    axes.check(width > 0 && width <= 1) { "width: must be above 0, at most 1" }
    f.text("runtime", "")
    f.text("compute_units", "", max = 64)
    f.optionalNumber("seconds")
    return Variant(
        Axes(
            width, axes.pair("size_px", 1..MAX_DIM, 1..MAX_DIM), axes.int("batch", 1L..64, 1).toInt(),
            axes.oneOf("precision", setOf("fp32", "fp16", "int8", "hybrid", "w8"), "fp32"), axes.pair("chunk", 0L..63, 1L..64, 0 to 1),
            axes.text("form", "", max = 32),
        ),
        f.paths("files", 4096), f.each("inputs", 1, 32, ::tensor), f.each("outputs", 1, 32, ::tensor), f.int("params", 0..MAX_INT, 0),
        f.int("macs", 0..MAX_INT, 0), f.oneOf("status", setOf("executed", "interpreted", "unverified"), "unverified"), f.optionalNumber("snr_db"),
        f.optionalNumber("gate_db"), f.optionalPath("plan"),
    )
}

private fun tensor(f: Fields): TensorSpec {
    if (!f.has("shape")) throw Wrong("shape: is missing")
    val shape = f.ints("shape", 1..MAX_DIM, 0, 8)
    var elements = 1L
    for (dim in shape) {
        elements *= dim // below 2^31 * 2^24 before each check
        f.check(elements <= MAX_ELEMENTS) { "has more than $MAX_ELEMENTS elements" }
    }
    f.text("meaning", "")
    return TensorSpec(f.text("name", pattern = NAME), f.oneOf("dtype", setOf("float32", "float16", "int64", "int32")), shape)
}

/** Everything that is used is listed, once. */
private fun checkClosed(m: Manifest) {
    fun check(good: Boolean, what: String) {
        if (!good) throw Wrong(what)
    }
    val known = m.files.map { it.path }
    val lower = known.map { it.lowercase(java.util.Locale.ROOT) }.toSet()
    check(lower.size == known.size, "a file is listed twice (upper and lower case count as the same)")
    check("manifest.json" !in lower, "manifest.json lists itself")
    var total = 0L
    for (entry in m.files) {
        total += entry.bytes // a sum above the limit ends at once, long before it overflows
        check(total <= MAX_BUNDLE_BYTES, "the files have more than $MAX_BUNDLE_BYTES bytes together")
    }
    val named = m.components.flatMap { c -> c.variants.flatMap { it.files + listOfNotNull(it.plan) } } + m.model.tokenizers.map { it.file } + m.samplers.map { it.file } +
        m.policies.map { it.file } + listOfNotNull(m.golden, m.prompts)
    val missing = (named.toSet() - known.toSet()).minOrNull()
    check(missing == null, "$missing is used but not listed in files")
    check(m.components.map { it.name }.toSet().size == m.components.size, "a component is listed twice")
    check(m.policies.map { it.name }.toSet().size == m.policies.size, "a policy is listed twice")
}
