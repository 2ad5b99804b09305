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
        let form: [UInt8] = [8, 2, 0, 0, 0]  // 8 bits, RGB, deflate, filters, not interlaced
        var out = signature + chunk("IHDR", word(width) + word(height) + form)
        if let settings { out += chunk("tEXt", Array("\(key)\0\(settings.dumped)".utf8)) }
        out += chunk("IDAT", deflate(filtered(image)))
        return out + chunk("IEND", [])
    }

    /// The settings in a PNG, not yet checked; every chunk's checksum is verified. DataError for one that is broken, no
    /// PNG, or not edgesd's.
    public static func settings(_ data: [UInt8]) throws -> Json {
        let fix = "Give a PNG that edgesd made, as it was written: many programs drop a picture's settings"
        func bad(_ what: String) -> EdgesdError { dataError("the picture \(what)", "a whole PNG with settings of edgesd", fix) }
        guard data.count <= maxBytes, data.starts(with: signature) else { throw bad("is no PNG") }
        var at = signature.count, found: [UInt8]?, ended = false
        while at + 12 <= data.count, !ended {
            let length = Int(number(data[at..<at + 4]))
            guard length <= data.count - at - 12 else { throw bad("is cut off") }
            let body = data[at + 4..<at + 8 + length], end = at + 8 + length
            guard crc32(body) == number(data[end..<end + 4]) else { throw bad("is broken") }
            let kind = String(decoding: body.prefix(4), as: UTF8.self), value = body.dropFirst(4)
            if kind == "tEXt", value.starts(with: "\(key)\0".utf8) { found = Array(value.dropFirst(key.utf8.count + 1)) }
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
            out.append(isLast)
            for size in [length, ~length] { out += [UInt8(size & 255), UInt8(size >> 8)] }
            out += part
        }
        return out + adler32(data)
    }

    private static func chunk(_ kind: String, _ data: [UInt8]) -> [UInt8] {
        let body: [UInt8] = Array(kind.utf8) + data
        let check: [UInt8] = word(Int(crc32(body[...])))
        return word(data.count) + body + check
    }

    private static func word(_ value: Int) -> [UInt8] { withUnsafeBytes(of: UInt32(value).bigEndian) { Array($0) } }

    private static func number(_ bytes: ArraySlice<UInt8>) -> UInt32 {
        bytes.reduce(UInt32(0)) { (sum: UInt32, byte: UInt8) -> UInt32 in sum << 8 | UInt32(byte) }
    }

    private static func adler32(_ data: [UInt8]) -> [UInt8] {
        var (a, b): (UInt32, UInt32) = (1, 0)
        for byte in data {
            a = (a + UInt32(byte)) % 65521
            b = (b + a) % 65521
        }
        return word(Int(b << 16 | a))
    }

    private static let crcTable: [UInt32] = (0..<256).map { n in
        (0..<8).reduce(UInt32(n)) { (c: UInt32, _) -> UInt32 in
            let half = c >> 1
            return c & 1 == 1 ? 0xEDB8_8320 ^ half : half
        }
    }

    private static func crc32(_ data: ArraySlice<UInt8>) -> UInt32 {
        ~data.reduce(~UInt32(0)) { (crc: UInt32, byte: UInt8) -> UInt32 in
            crcTable[Int((crc ^ UInt32(byte)) & 255)] ^ (crc >> 8)
        }
    }
}
