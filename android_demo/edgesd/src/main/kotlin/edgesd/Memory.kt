/** Whether a device can hold a bundle's largest component, before anything is loaded. */
package edgesd

private const val PACKED = 2 // a file is mapped, and XNNPACK or the GPU keeps a packed copy of its weights
private const val LIVE = 32 // activations alive at once, in tensors of the largest input or output
private const val APP_BYTES = 96L shl 20

/** What drawing takes at most, one component in memory at a time: an upper estimate from file sizes and shapes, not a measurement. */
fun neededBytes(manifest: Manifest): Long {
    val sizes = manifest.files.associate { it.path to it.bytes }
    return APP_BYTES + manifest.components.maxOf { component ->
        component.variants.groupBy { it.axes.copy(chunk = 0 to 1) }.values.maxOf { chunks ->
            val weights = chunks.flatMap { it.files }.distinct().sumOf(sizes::getValue)
            val largest = chunks.flatMap { it.inputs + it.outputs }.maxOf { spec -> spec.shape.fold(4L) { total, dim -> total * dim } }
            PACKED * weights + LIVE * largest
        }
    }
}

/** Throws SetupError where the device has less. */
fun checkMemory(manifest: Manifest, availableBytes: Long) {
    val needed = neededBytes(manifest)
    if (needed > availableBytes) {
        throw SetupError(
            "this model needs about ${needed shr 20} MB and ${availableBytes shr 20} MB are free", "models that fit", "Close other apps, or package it smaller (--width, int8)",
        )
    }
}
