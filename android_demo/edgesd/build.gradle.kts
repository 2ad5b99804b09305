plugins {
    alias(libs.plugins.kotlin.jvm)
}

// Any JDK from 17 on builds it, Android Studio's own too.
java {
    sourceCompatibility = JavaVersion.VERSION_17
    targetCompatibility = JavaVersion.VERSION_17
}
kotlin { compilerOptions { jvmTarget = org.jetbrains.kotlin.gradle.dsl.JvmTarget.JVM_17 } }

// The tests have a main of their own, so that a bare Kotlin compiler runs them too (make test-android in the repository's root).
val golden by tasks.registering(JavaExec::class) {
    classpath = sourceSets["test"].runtimeClasspath
    mainClass = "edgesd.MainKt"
    args(rootDir.resolve("../tests/golden").path)
}
tasks.named("check") { dependsOn(golden) }
