@file:Suppress("unused", "PackageDirectoryMismatch")

package org.tensorflow.lite.gpu

import org.tensorflow.lite.Delegate

class GpuDelegate : Delegate { override fun close() = Unit }
