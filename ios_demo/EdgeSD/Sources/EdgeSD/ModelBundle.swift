import Foundation

/// A bundle on disk, read with nothing taken on trust (edgesd/bundle.py). Foundation has a Bundle of its own.
public struct ModelBundle: Sendable {
    public let folder: URL
    public let manifest: Manifest
    /// This read computed every SHA-256; false: a receipt vouches for an earlier read.
    public let hashed: Bool

    private static let again = "Get the bundle again from where it came, or package the model again"
    private static let droppings: Set = [".DS_Store", "Thumbs.db", "desktop.ini"]

    /// Opens a bundle. receipts: a folder outside of any bundle for what vouches for earlier reads, nil = hash always.
    /// verify: hash whatever a receipt says. progress: bytes hashed, of how many.
    /// RequestError if there is no folder, DataError for anything broken, unfinished, hostile or too new.
    public static func read(
        _ folder: URL, receipts: URL? = nil, verify: Bool = false, progress: (Int, Int) -> Void = { _, _ in }
    ) throws -> ModelBundle {
        let place = folder.resolvingSymlinksInPath().standardizedFileURL.path
        let data = try manifestBytes(place)
        let manifest = try Manifest.parse(data)
        let seen = try walk(place, listed: Set(manifest.files.map(\.path)))
        for entry in manifest.files { try checkFile(entry, seen[entry.path]) }
        let receipt = receipts.map { Receipt(in: $0, place: place, manifest: data, seen: seen) }
        let hashed = verify || receipt?.isKept != true
        if hashed {
            let total = manifest.files.reduce(0) { $0 + $1.bytes }
            var done = 0
            for entry in manifest.files {
                guard try Files.sha256("\(place)/\(entry.path)") == entry.sha256 else {
                    throw dataError("\(entry.path) does not have the sha256 of its manifest",
                                    "the bytes that were packaged", again)
                }
                done += entry.bytes
                progress(done, total)
            }
            receipt?.keep()
        }
        return ModelBundle(folder: URL(fileURLWithPath: place), manifest: manifest, hashed: hashed)
    }

    /// Where a listed file lies, as a runtime may open it now. RequestError for a name the manifest does not list,
    /// DataError if the file is no longer what was read.
    public func path(_ relative: String) throws -> URL {
        guard let entry = manifest.files.first(where: { $0.path == relative }) else {
            throw requestError("'\(shown(relative))' is no file of \(folder.lastPathComponent)",
                               "files its manifest lists", "Name one")
        }
        let path = "\(folder.path)/\(relative)"
        try ModelBundle.checkFile(entry, try Files.status(path))
        guard URL(fileURLWithPath: path).resolvingSymlinksInPath().path == path else {
            throw dataError("\(relative) leads out of \(folder.lastPathComponent)", "files inside the bundle",
                            ModelBundle.again)
        }
        return URL(fileURLWithPath: path)
    }

    /// A listed file's bytes, at most `limit`.
    func bytes(_ relative: String, limit: Int) throws -> [UInt8] { try Files.read(try path(relative).path, limit: limit) }

    private static func manifestBytes(_ place: String) throws -> [UInt8] {
        let name = URL(fileURLWithPath: place).lastPathComponent
        guard let found = try Files.status(place) else {
            throw requestError("\(name) does not exist", "the folder of a bundle", "Check the path")
        }
        guard found.kind == .folder else {
            throw requestError("\(name) is a file", "a bundle, which is a folder", "Unpack it, and choose the folder")
        }
        guard let manifest = try Files.status("\(place)/manifest.json") else {
            throw dataError("\(name) has no manifest.json: an unfinished bundle, or no bundle at all",
                            "a folder that edgesd package finished", "Package the model again")
        }
        guard manifest.kind == .regular, manifest.hardLinks == 1 else {
            throw dataError("manifest.json in \(name) is a link or no regular file", "a plain file", again)
        }
        return try Files.read("\(place)/manifest.json", limit: Manifest.maxBytes + 1)
    }

    /// Everything under a bundle by relative path. The walk ends at the first thing that is not listed, so that neither
    /// a million files nor a folder a mile deep costs anything.
    private static func walk(_ root: String, listed: Set<String>) throws -> [String: Files.Status] {
        var folders: Set<String> = []
        for path in listed {
            var parts = path.split(separator: "/").dropLast()
            while !parts.isEmpty {
                folders.insert(parts.joined(separator: "/"))
                parts = parts.dropLast()
            }
        }
        var found: [String: Files.Status] = [:]
        var todo = [""]
        while let inside = todo.popLast() {
            for name in try Files.names("\(root)/\(inside)") {
                let path = inside + name
                guard !droppings.contains(name), !name.hasPrefix("._"), path != "manifest.json",
                    let status = try Files.status("\(root)/\(path)")
                else { continue }
                if status.kind == .folder, folders.contains(path) {
                    todo.append(path + "/")
                } else if listed.contains(path) {
                    found[path] = status
                } else {
                    throw dataError("'\(shown(path))' is in the bundle and not in its manifest", "listed files only", again)
                }
            }
        }
        return found
    }

    private static func checkFile(_ entry: FileEntry, _ found: Files.Status?) throws {
        guard let found else { throw dataError("\(entry.path) is missing", "every file the manifest lists", again) }
        guard found.kind != .link, found.kind != .regular || found.hardLinks == 1 else {
            throw dataError("\(entry.path) is a link", "files that are nowhere else", "Copy the bundle, and use the copy")
        }
        guard found.kind == .regular else {
            throw dataError("\(entry.path) is not a regular file", "regular files only", again)
        }
        guard found.bytes == entry.bytes else {
            throw dataError("\(entry.path) has \(found.bytes) bytes", "\(entry.bytes), as its manifest says", again)
        }
    }
}

/// What a read found when every hash was right. The change time is there because nobody can set it back.
private struct Receipt {
    let file: URL
    let text: String

    init(in folder: URL, place: String, manifest: [UInt8], seen: [String: Files.Status]) {
        file = folder.appendingPathComponent("\(Sha256.hex(place.utf8)).txt")
        let facts = seen.sorted { $0.key < $1.key }.map { "\($0.key) \($0.value.facts)" }
        text = ([place, Sha256.hex(manifest)] + facts).joined(separator: "\n")
    }

    var isKept: Bool { (try? String(contentsOf: file, encoding: .utf8)).map { Exact($0) == Exact(text) } ?? false }

    /// A receipt that cannot be written costs the next read its time, and nothing else.
    func keep() {
        try? FileManager.default.createDirectory(at: file.deletingLastPathComponent(), withIntermediateDirectories: true)
        try? Files.writeWhole(file, Array(text.utf8))
    }
}
