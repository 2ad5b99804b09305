import Foundation

#if canImport(Glibc)
import Glibc
#elseif canImport(Darwin)
import Darwin
#endif

/// Files that are never half there, read with nothing taken on trust (edgesd/files.py).
enum Files {
    enum Kind { case regular, folder, link, other }

    struct Status {
        let kind: Kind
        let bytes, hardLinks: Int
        /// Size, times and inode in one text: what a receipt compares.
        let facts: String
    }

    /// What lies at a path, links not followed; nil where there is nothing.
    static func status(_ path: String) throws -> Status? {
        var found = stat()
        guard lstat(path, &found) == 0 else {
            guard errno == ENOENT || errno == ENOTDIR else { throw unreadable(path) }
            return nil
        }
        #if canImport(Darwin)
        let (modified, changed) = (found.st_mtimespec, found.st_ctimespec)
        #else
        let (modified, changed) = (found.st_mtim, found.st_ctim)
        #endif
        let kind: Kind
        switch found.st_mode & S_IFMT {
        case S_IFREG: kind = .regular
        case S_IFDIR: kind = .folder
        case S_IFLNK: kind = .link
        default: kind = .other
        }
        let facts = [
            Int(found.st_size), Int(modified.tv_sec), Int(modified.tv_nsec), Int(changed.tv_sec), Int(changed.tv_nsec),
            Int(found.st_ino),
        ].map(String.init).joined(separator: " ")
        return Status(kind: kind, bytes: Int(found.st_size), hardLinks: Int(found.st_nlink), facts: facts)
    }

    private static func unreadable(_ path: String) -> EdgesdError {
        let reason = String(cString: strerror(errno))
        return dataError("\(URL(fileURLWithPath: path).lastPathComponent) cannot be read (\(reason))", "a regular file",
                         "Get the bundle again from where it came")
    }

    /// A regular file's bytes, at most `limit`; never follows a link, never waits on a pipe.
    static func read(_ path: String, limit: Int) throws -> [UInt8] {
        var data: [UInt8] = []
        try each(path) { part in
            data += part
            return data.count <= limit
        }
        return Array(data.prefix(limit))
    }

    static func sha256(_ path: String) throws -> String {
        var hash = Sha256()
        try each(path) { part in
            hash.update(part)
            return true
        }
        return hash.finish().map { String(format: "%02x", $0) }.joined()
    }

    /// Calls `body` with a regular file's parts until it says false.
    private static func each(_ path: String, _ body: ([UInt8]) throws -> Bool) throws {
        let file = open(path, O_RDONLY | O_NOFOLLOW | O_NONBLOCK)
        guard file >= 0 else { throw unreadable(path) }
        defer { close(file) }
        var found = stat()
        guard fstat(file, &found) == 0, found.st_mode & S_IFMT == S_IFREG else { throw unreadable(path) }
        var buffer = [UInt8](repeating: 0, count: 1 << 20)
        while true {
            let count = buffer.withUnsafeMutableBytes { unistdRead(file, $0.baseAddress!, $0.count) }
            guard count >= 0 else { throw unreadable(path) }
            guard count > 0, try body(Array(buffer[..<count])) else { return }
        }
    }

    /// Names in a folder.
    static func names(_ folder: String) throws -> [String] {
        do { return try FileManager.default.contentsOfDirectory(atPath: folder) } catch { throw unreadable(folder) }
    }

    /// Writes a file so that it appears whole or not at all.
    static func writeWhole(_ path: URL, _ data: [UInt8]) throws {
        do {
            try Data(data).write(to: path, options: .atomic)
        } catch {
            throw EdgesdError(.setup, "\(path.lastPathComponent) cannot be written (\(shown(error.localizedDescription)))",
                              "a folder with room", "Free some space")
        }
    }
}

private func unistdRead(_ file: Int32, _ buffer: UnsafeMutableRawPointer, _ count: Int) -> Int {
    read(file, buffer, count)
}
