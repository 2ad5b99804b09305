/** A bundle's `.tflite` files in LiteRT: XNNPACK on the CPU, or the GPU delegate for the variants made for it. */
package edgesd.app

import edgesd.DataError
import edgesd.Bundle
import edgesd.Floats
import edgesd.Longs
import edgesd.NdArray
import edgesd.Bytes
import edgesd.TensorSpec
import edgesd.Variant
import edgesd.runtime.Call
import edgesd.runtime.ComponentSession
import java.nio.ByteBuffer
import java.nio.ByteOrder
import java.nio.file.Path
import org.tensorflow.lite.Interpreter
import org.tensorflow.lite.gpu.GpuDelegate

const val GPU_FORM = "gpu"

/** gpu: prefer the variants of form "gpu", and run those by the delegate; the others stay on the CPU. */
fun openSession(bundle: Bundle, gpu: Boolean): ComponentSession =
    ComponentSession(bundle, form = if (gpu) GPU_FORM else "") { variant, paths -> LiteRtCall(variant, paths[0]) }

private class LiteRtCall(private val variant: Variant, path: Path) : Call {
    private val delegate = if (variant.axes.form == GPU_FORM) GpuDelegate() else null
    private val interpreter: Interpreter

    init {
        val options = Interpreter.Options()
        options.setNumThreads(maxOf(1, Runtime.getRuntime().availableProcessors() / 2)) // the slow cores only hold the fast ones up
        if (delegate != null) options.addDelegate(delegate) else options.setUseXNNPACK(true)
        interpreter = Interpreter(path.toFile(), options)
        interpreter.allocateTensors()
    }

    override fun run(inputs: Map<String, NdArray>): Map<String, Floats> {
        val given = variant.inputs.associate { it.name to packed(inputs.getValue(it.name), it) }
        val made = variant.outputs.associate { it.name to buffer(it) }
        interpreter.runSignature(given, made)
        return variant.outputs.associate { it.name to floats(made.getValue(it.name), it) }
    }

    override fun close() {
        interpreter.close()
        delegate?.close()
    }
}

private fun width(spec: TensorSpec) = when (spec.dtype) {
    "int64" -> 8
    "float32", "int32" -> 4
    else -> throw DataError("${spec.name} of type ${spec.dtype}", "float32, int32 or int64", "Package the model again")
}

private fun buffer(spec: TensorSpec): ByteBuffer =
    ByteBuffer.allocateDirect(NdArray.count(spec.shape) * width(spec)).order(ByteOrder.nativeOrder())

private fun packed(array: NdArray, spec: TensorSpec): ByteBuffer {
    val out = buffer(spec)
    when (array) {
        is Floats -> out.asFloatBuffer().put(array.data)
        is Longs -> if (spec.dtype == "int64") out.asLongBuffer().put(array.data) else array.data.forEach { out.putInt(it.toInt()) }
        is Bytes -> throw DataError("${spec.name} as bytes", spec.dtype, "Report this as a bug")
    }
    out.rewind()
    return out
}

private fun floats(buffer: ByteBuffer, spec: TensorSpec): Floats {
    buffer.rewind()
    return Floats(spec.shape, FloatArray(NdArray.count(spec.shape)).also { buffer.asFloatBuffer().get(it) })
}
