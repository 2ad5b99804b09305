import Foundation

/// PNG with a picture's settings in a text chunk, as Python writes and reads it. Written whole by this file: ImageIO
/// drops text chunks that it does not know, and Linux has no ImageIO.
public enum Png {
    static let key = "edgesd"
    static let maxSettingsChars = 1 << 20, maxBytes = 256 << 20
    private static let signature: [UInt8] = [0x89, 0x50, 0x4E, 0x47, 0x0D, 0x0A, 0x1A, 0x0A]

    /// A picture [H,W,3] as PNG bytes. settings: what goes into the text chunk.
    public static func encode(_ image: NDArray<UInt8>, settings: Json? = nil) -> [UInt8] {
        let (height, width) = (image.shape[0], image.shape[1])
        let head = word(width) + word(height) + [8, 2, 0, 0, 0]  // 8 bits, RGB, deflate, filters, not interlaced
        var out = signature + chunk("IHDR", head)
        if let settings { out += chunk("tEXt", Array(key.utf8) + [0] + Array(settings.dumped.utf8)) }
        return out + chunk("IDAT", deflate(filtered(image))) + chunk("IEND", [])
    }

    /// The settings in a PNG, not yet checked; every chunk's checksum is verified. DataError for one that is broken, no
    /// PNG, or not edgesd's.
    public static func settings(_ data: [UInt8]) throws -> Json {
        let fix = "Give a PNG that edgesd made, as it was written: many programs drop a picture's settings"
        func bad(_ what: String) -> EdgesdError { dataError("the picture \(what)", "a whole PNG with settings of edgesd", fix) }
        guard data.count <= maxBytes, data.starts(with: signature) else { throw bad("is no PNG") }
        var at = signature.count, found: [UInt8]?, ended = false
        while at + 12 <= data.count, !ended {
            let length = data[at..<at + 4].reduce(0) { $0 << 8 | Int($1) }
            guard length <= data.count - at - 12 else { throw bad("is cut off") }
            let body = data[at + 4..<at + 8 + length], end = at + 8 + length
            guard crc32(body) == data[end..<end + 4].reduce(UInt32(0), { $0 << 8 | UInt32($1) }) else { throw bad("is broken") }
            let kind = String(decoding: body.prefix(4), as: UTF8.self), value = body.dropFirst(4)
            if kind == "tEXt", value.starts(with: Array(key.utf8) + [0]) { found = Array(value.dropFirst(key.utf8.count + 1)) }
            ended = kind == "IEND"
            at = end + 4
        }
        guard ended else { throw bad("is cut off") }
        guard let found, found.count <= maxSettingsChars else { throw bad("carries no settings of edgesd") }
        let json = try Json.parse(found, orElse: bad("has settings that do not parse"))
        guard json.object != nil else { throw bad("has settings that do not parse") }
        return json
    }

    /// Rows with the filter "up", which suits pictures: each byte less the one above.
    private static func filtered(_ image: NDArray<UInt8>) -> [UInt8] {
        let width = image.shape[1] * 3
        var out: [UInt8] = []
        out.reserveCapacity(image.count + image.shape[0])
        for row in 0..<image.shape[0] {
            out.append(2)
            for i in row * width..<(row + 1) * width {
                out.append(image.values[i] &- (row > 0 ? image.values[i - width] : 0))
            }
        }
        return out
    }

    /// A zlib stream: Foundation's deflate where it is, stored blocks elsewhere (RFC 1950, 1951).
    private static func deflate(_ data: [UInt8]) -> [UInt8] {
        #if canImport(Darwin)
        if let packed = try? (Data(data) as NSData).compressed(using: .zlib) {
            return [0x78, 0x9C] + [UInt8](packed as Data) + adler32(data)
        }
        #endif
        var out: [UInt8] = [0x78, 0x01]
        for first in stride(from: 0, to: data.count, by: 65535) {
            let part = data[first..<min(first + 65535, data.count)], length = UInt16(part.count)
            let isLast: UInt8 = first + 65535 >= data.count ? 1 : 0
            out += [isLast, UInt8(length & 255), UInt8(length >> 8), UInt8(~length & 255), UInt8(~length >> 8)] + part
        }
        return out + adler32(data)
    }

    private static func chunk(_ kind: String, _ data: [UInt8]) -> [UInt8] {
        let body = Array(kind.utf8) + data
        return word(data.count) + body + word(Int(crc32(body[...])))
    }

    private static func word(_ value: Int) -> [UInt8] { (0..<4).map { UInt8(truncatingIfNeeded: value >> (24 - 8 * $0)) } }

    private static func adler32(_ data: [UInt8]) -> [UInt8] {
        var (a, b): (UInt32, UInt32) = (1, 0)
        for byte in data {
            a = (a + UInt32(byte)) % 65521
            b = (b + a) % 65521
        }
        return word(Int(b << 16 | a))
    }

    private static let crcTable: [UInt32] = (0..<256).map { n in
        (0..<8).reduce(UInt32(n)) { c, _ in c & 1 == 1 ? 0xEDB8_8320 ^ c >> 1 : c >> 1 }
    }

    private static func crc32(_ data: ArraySlice<UInt8>) -> UInt32 {
        ~data.reduce(~UInt32(0)) { crcTable[Int(($0 ^ UInt32($1)) & 255)] ^ $0 >> 8 }
    }
}
