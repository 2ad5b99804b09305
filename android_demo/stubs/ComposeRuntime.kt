@file:Suppress("unused", "PackageDirectoryMismatch")

package androidx.compose.runtime

import kotlin.reflect.KProperty

@Target(AnnotationTarget.FUNCTION, AnnotationTarget.TYPE, AnnotationTarget.TYPE_PARAMETER, AnnotationTarget.PROPERTY_GETTER)
annotation class Composable

interface State<out T> { val value: T }
interface MutableState<T> : State<T> { override var value: T }

private class Held<T>(override var value: T) : MutableState<T>

fun <T> mutableStateOf(value: T): MutableState<T> = Held(value)
fun <T> mutableStateListOf(): MutableList<T> = ArrayList()
operator fun <T> State<T>.getValue(owner: Any?, property: KProperty<*>): T = value
operator fun <T> MutableState<T>.setValue(owner: Any?, property: KProperty<*>, value: T) { this.value = value }

@Composable
fun <T> remember(make: () -> T): T = make()

@Composable
fun <T> remember(key: Any?, make: () -> T): T = make()
