/**
 * Bundles on disk, read with nothing taken on trust (edgesd/bundle.py): names, kinds and sizes every time, every sha256 at the first read.
 *
 * A receipt in the app's own folder, never in the bundle, makes later reads a matter of `stat`.
 */
package edgesd

import java.io.IOException
import java.nio.file.Files
import java.nio.file.LinkOption.NOFOLLOW_LINKS
import java.nio.file.Path
import java.nio.file.StandardCopyOption.ATOMIC_MOVE
import java.nio.file.StandardCopyOption.REPLACE_EXISTING
import java.nio.file.attribute.BasicFileAttributes
import java.security.MessageDigest

const val MANIFEST = "manifest.json"
private const val AGAIN = "Get the bundle again from where it came, or package the model again"
private val DROPPINGS = setOf(".DS_Store", "Thumbs.db", "desktop.ini")

/** A checked bundle. hashed: this read computed every sha256. */
class Bundle(val folder: Path, val manifest: Manifest, val hashed: Boolean) {
    /** Where a listed file lies, as a runtime may open it now; checked again. */
    fun path(relative: String): Path {
        val entry = manifest.files.firstOrNull { it.path == relative }
            ?: throw RequestError("'${shown(relative, 80)}' is no file of ${folder.fileName}", "files its manifest lists", "Name one")
        val path = folder.resolve(relative)
        checkFile(entry, stat(path))
        if (path.toRealPath() != path) throw DataError("$relative leads out of the bundle", "files inside the bundle", AGAIN)
        return path
    }

    /** A listed file's bytes; more than [most] is refused. */
    fun bytes(relative: String, most: Long): ByteArray {
        val path = path(relative)
        if (Files.size(path) > most) throw DataError("$relative has ${Files.size(path)} bytes", "up to $most", AGAIN)
        return Files.readAllBytes(path)
    }
}

/**
 * Opens a bundle. receipts: a folder of the app's own; null or verify: every sha256 is computed. progress: bytes hashed of bytes.
 * Throws RequestError where there is no folder, DataError for anything broken, unfinished, hostile or too new.
 */
fun readBundle(folder: Path, receipts: Path? = null, verify: Boolean = false, progress: (Long, Long) -> Unit = { _, _ -> }): Bundle {
    try {
        if (!Files.isDirectory(folder)) throw RequestError("no bundle at ${folder.fileName}", "the folder of a bundle", "Import one")
        val place = folder.toRealPath()
        val data = manifestBytes(place)
        val manifest = parseManifest(data)
        val seen = walk(place, manifest.files.map { it.path }.toSet())
        for (entry in manifest.files) checkFile(entry, seen[entry.path])
        val facts = facts(place, data, seen)
        val receipt = receipts?.resolve(sha256(place.toString().toByteArray()) + ".txt")
        val known = receipt != null && Files.isRegularFile(receipt) && String(Files.readAllBytes(receipt)) == facts
        if (known && !verify) return Bundle(place, manifest, hashed = false)
        val total = manifest.files.sumOf { it.bytes }
        var done = 0L
        for (entry in manifest.files) {
            val found = sha256(place.resolve(entry.path)) { progress(done + it, total) }
            if (found != entry.sha256) throw DataError("${entry.path} does not have the sha256 of its manifest", "the bytes that were packaged", AGAIN)
            done += entry.bytes
        }
        if (receipt != null) {
            Files.createDirectories(receipts)
            writeWhole(receipt, facts.toByteArray())
        }
        return Bundle(place, manifest, hashed = true)
    } catch (error: IOException) {
        throw DataError("${folder.fileName} cannot be read (${shown(error.message, 120)})", "a bundle that stays as it is", AGAIN, error)
    }
}

private fun manifestBytes(place: Path): ByteArray {
    val path = place.resolve(MANIFEST)
    val found = stat(path) ?: throw DataError("${place.fileName} has no $MANIFEST: an unfinished bundle, or none at all", "a whole bundle", AGAIN)
    if (!found.isRegularFile || links(path) > 1) throw DataError("$MANIFEST is a link or no regular file", "a plain file", AGAIN)
    if (found.size() > MAX_MANIFEST_BYTES) throw DataError("$MANIFEST has ${found.size()} bytes", "up to $MAX_MANIFEST_BYTES", AGAIN)
    return Files.readAllBytes(path)
}

private fun stat(path: Path): BasicFileAttributes? = try {
    Files.readAttributes(path, BasicFileAttributes::class.java, NOFOLLOW_LINKS)
} catch (_: java.nio.file.NoSuchFileException) {
    null
}

/** Names of a file; 1 where the system does not tell (then only one name can be seen anyway). */
private fun links(path: Path): Int = try {
    Files.getAttribute(path, "unix:nlink", NOFOLLOW_LINKS) as Int
} catch (_: UnsupportedOperationException) {
    1
} catch (_: IllegalArgumentException) {
    1
}

/** Every file under [root] by relative path, the manifest left out; ends at the first thing that [listed] does not hold. */
private fun walk(root: Path, listed: Set<String>): Map<String, BasicFileAttributes> {
    val folders = listed.flatMap { path -> path.indices.filter { path[it] == '/' }.map { path.substring(0, it) } }.toSet()
    val found = HashMap<String, BasicFileAttributes>()
    val todo = ArrayDeque(listOf(""))
    while (todo.isNotEmpty()) {
        val inside = todo.removeLast()
        Files.newDirectoryStream(root.resolve(inside)).use { entries ->
            for (entry in entries) {
                val name = entry.fileName.toString()
                val path = inside + name
                val status = stat(entry) ?: continue
                if (name in DROPPINGS || name.startsWith("._") || path == MANIFEST) continue
                if (status.isDirectory && path in folders) todo.add("$path/")
                else if (path in listed) found[path] = status
                else throw DataError("'${shown(path, 120)}' is in the bundle and not in its manifest", "listed files only", AGAIN)
            }
        }
    }
    for (path in found.keys) if (links(root.resolve(path)) > 1 && found.getValue(path).isRegularFile) throw isLink(path)
    return found
}

private fun isLink(path: String) = DataError("$path is a link", "files that are nowhere else", "Copy the bundle with its links followed")

private fun checkFile(entry: FileEntry, found: BasicFileAttributes?) {
    if (found == null) throw DataError("${entry.path} is missing", "every file the manifest lists", AGAIN)
    if (found.isSymbolicLink) throw isLink(entry.path)
    if (!found.isRegularFile) throw DataError("${entry.path} is not a regular file", "regular files only", AGAIN)
    if (found.size() != entry.bytes) throw DataError("${entry.path} has ${found.size()} bytes", "${entry.bytes}, as its manifest says", AGAIN)
}

private fun facts(place: Path, manifest: ByteArray, seen: Map<String, BasicFileAttributes>): String = buildString {
    append(place).append('\n').append(sha256(manifest)).append('\n')
    for ((path, status) in seen.toSortedMap()) {
        append(path).append(' ').append(status.size()).append(' ').append(status.lastModifiedTime()).append(' ').append(status.fileKey()).append('\n')
    }
}

fun sha256(data: ByteArray): String = hex(MessageDigest.getInstance("SHA-256").digest(data))

fun sha256(path: Path, progress: (Long) -> Unit = {}): String {
    val digest = MessageDigest.getInstance("SHA-256")
    var done = 0L
    Files.newInputStream(path, NOFOLLOW_LINKS).use { input ->
        val buffer = ByteArray(1 shl 16)
        while (true) {
            val read = input.read(buffer)
            if (read < 0) break
            digest.update(buffer, 0, read)
            done += read
            progress(done)
        }
    }
    return hex(digest.digest())
}

internal fun hex(data: ByteArray): String = data.joinToString("") { (it.toInt() and 255).toString(16).padStart(2, '0') }

/** Writes a file so that it appears whole or not at all. */
fun writeWhole(path: Path, data: ByteArray) {
    val part = path.resolveSibling(".${path.fileName}.part")
    Files.newOutputStream(part).use { it.write(data) }
    Files.move(part, path, ATOMIC_MOVE, REPLACE_EXISTING)
}
