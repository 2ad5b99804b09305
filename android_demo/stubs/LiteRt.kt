@file:Suppress("unused", "UNUSED_PARAMETER", "PackageDirectoryMismatch")

package org.tensorflow.lite

import java.io.File

interface Delegate : java.io.Closeable
class Interpreter(file: File, options: Options) : AutoCloseable {
    class Options {
        fun setNumThreads(count: Int) = this
        fun setUseXNNPACK(use: Boolean) = this
        fun addDelegate(delegate: Delegate) = this
    }
    fun allocateTensors() = Unit
    fun runSignature(inputs: Map<String, Any>, outputs: Map<String, Any>) = Unit
    override fun close() = Unit
}
