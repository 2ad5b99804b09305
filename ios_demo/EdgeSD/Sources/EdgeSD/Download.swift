import Foundation

#if canImport(FoundationNetworking)
import FoundationNetworking
#endif

/// A bundle from the web or from another folder, a file at a time, so that it appears whole or not at all. What was
/// fetched before an interruption stays in `.NAME.part` beside its place, and the next try goes on behind it.
public struct Download {
    /// Gives a file's bytes from `offset` on, in parts. Throws where there are none; may begin at 0 all the same, and
    /// says so by its first argument.
    public typealias Fetch = (_ path: String, _ offset: Int, _ part: (_ at: Int, [UInt8]) throws -> Void) async throws -> Void

    private let fetch: Fetch

    public init(fetch: @escaping Fetch) { self.fetch = fetch }

    /// Fetches the bundle into `destination` and checks it. progress: bytes here, of how many. Cancelling the task keeps
    /// what came. DataError where a file does not have the hash of its manifest (that file is then fetched anew).
    public func run(to destination: URL, progress: @escaping (Int, Int) -> Void = { _, _ in }) async throws -> ModelBundle {
        let files = FileManager.default
        guard !files.fileExists(atPath: destination.path) else { return try ModelBundle.read(destination) }
        let part = destination.deletingLastPathComponent().appendingPathComponent(".\(destination.lastPathComponent).part")
        var data: [UInt8] = []
        try await fetch("manifest.json", 0) { _, bytes in
            data += bytes
            guard data.count <= Manifest.maxBytes else {
                throw dataError("a manifest of more than \(Manifest.maxBytes) bytes", "a bundle's manifest", "Check the address")
            }
        }
        let manifest = try Manifest.parse(data)  // nothing is written by a path that was not checked
        try Download.checkRoom(manifest, beside: destination)
        if (try? Files.read(part.appendingPathComponent("manifest.json").path, limit: Manifest.maxBytes + 1)) != data {
            try? files.removeItem(at: part)  // another bundle's leftovers
        }
        try files.createDirectory(at: part, withIntermediateDirectories: true)
        try Files.writeWhole(part.appendingPathComponent("manifest.json"), data)
        let total = manifest.files.reduce(0) { $0 + $1.bytes }
        var done = 0
        for entry in manifest.files {
            try await get(entry, part.appendingPathComponent(entry.path)) { progress(done + $0, total) }
            done += entry.bytes
            progress(done, total)
        }
        _ = try ModelBundle.read(part)
        try files.moveItem(at: part, to: destination)
        return try ModelBundle.read(destination)
    }

    /// One file: what is there already counts, a wrong hash deletes it.
    private func get(_ entry: FileEntry, _ path: URL, _ progress: (Int) -> Void) async throws {
        let files = FileManager.default
        try files.createDirectory(at: path.deletingLastPathComponent(), withIntermediateDirectories: true)
        if !files.fileExists(atPath: path.path) { try Files.writeWhole(path, []) }
        let file = try FileHandle(forWritingTo: path)
        defer { try? file.close() }
        var size = Int(try file.seekToEnd())
        if size > entry.bytes { size = 0 }
        if size < entry.bytes {
            try await fetch(entry.path, size) { at, bytes in
                try Task.checkCancellation()
                guard at + bytes.count <= entry.bytes else {
                    throw dataError("\(entry.path) is longer than \(entry.bytes) bytes", "what the manifest says", "Try again")
                }
                try file.truncate(atOffset: UInt64(at))
                try file.seek(toOffset: UInt64(at))
                try file.write(contentsOf: Data(bytes))
                progress(at + bytes.count)
            }
        }
        guard try Files.sha256(path.path) == entry.sha256 else {
            try? files.removeItem(at: path)
            throw dataError("\(entry.path) did not arrive as it was packaged", "the bytes of its sha256", "Try again")
        }
    }

    private static func checkRoom(_ manifest: Manifest, beside destination: URL) throws {
        let need = manifest.files.reduce(0) { $0 + $1.bytes }
        let attributes = try? FileManager.default.attributesOfFileSystem(forPath: destination.deletingLastPathComponent().path)
        guard let free = attributes?[.systemFreeSize] as? NSNumber, free.intValue < need else { return }
        throw EdgesdError(.setup, "\(free.intValue >> 20) MB are free", "\(need >> 20) MB for this bundle", "Free some space")
    }

    /// From a folder, such as one chosen in Files; large files come in parts.
    public static func fromFolder(_ folder: URL) -> Fetch {
        { path, offset, part in
            let file = try FileHandle(forReadingFrom: folder.appendingPathComponent(path))
            defer { try? file.close() }
            try file.seek(toOffset: UInt64(offset))
            var at = offset
            while let data = try file.read(upToCount: 1 << 20), !data.isEmpty {
                try part(at, [UInt8](data))
                at += data.count
            }
        }
    }

    #if canImport(Darwin)
    /// From the web: the address of the folder that holds manifest.json. A range is asked for; a server that has none
    /// gives the whole file, and it begins anew.
    public static func fromWeb(_ folder: URL, session: URLSession = .shared) -> Fetch {
        { path, offset, part in
            var request = URLRequest(url: folder.appendingPathComponent(path))
            if offset > 0 { request.setValue("bytes=\(offset)-", forHTTPHeaderField: "Range") }
            let (bytes, response) = try await session.bytes(for: request)
            let status = (response as? HTTPURLResponse)?.statusCode ?? 0
            guard status == 200 || status == 206 else {
                throw dataError("the server answered \(status) for \(path)", "200 or 206", "Check the address")
            }
            var at = status == 206 ? offset : 0, buffer: [UInt8] = []
            buffer.reserveCapacity(1 << 20)
            for try await byte in bytes {
                buffer.append(byte)
                guard buffer.count == 1 << 20 else { continue }
                try part(at, buffer)
                at += buffer.count
                buffer.removeAll(keepingCapacity: true)
            }
            if !buffer.isEmpty { try part(at, buffer) }
        }
    }
    #endif
}
